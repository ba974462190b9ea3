"""Text to token ids and back, and back again while a stream is still arriving. (filled in next)"""


class Tokenizer:
    pass
