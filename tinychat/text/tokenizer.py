"""Text to token ids and back, and back again while a stream is still arriving."""

from __future__ import annotations

import bisect
import copy
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.files import read_text
from tinychat.text import chat_templates
from tinychat.text.chat_templates import DEFAULT
from tinychat.text.decoders import Decoding, Joiner
from tinychat.text.decoders import char_of_byte as char_of_byte  # programs know it by this module
from tinychat.text.prefixes import Before, Prefixes
from tinychat.text.reasoning import END, markers_in
from tinychat.text.tokenizer_file import bound_memory, guarded, load_backend, one_line, without_tokens

if TYPE_CHECKING:
    import tokenizers

    Spans = Sequence[tuple[int, int]]
    Offsets = Callable[[], list[tuple[int, int]]]

# Special tokens that end a turn whatever the checkpoint's own settings say (many forget one of them).
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<|tool_response>",  # Gemma 4: the result of a call is to come
    "<start_function_response>",
    "<|observation|>",
)
# Where <|end|> ends a channel (gpt-oss, Solar), these end the answer.
ANSWER_ENDS = ("<|return|>", "<|call|>", "<|calls|>", "<|flush|>")
SOME_TEXT = -1  # for `Tokenizer.encode`: a token that is no marker goes before
_SPACE = "\u2581"  # SentencePiece writes a space as this


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a chat needs around it.

    backend         the wrapped tokenizer; every marker in it is marked special, so that none is read in plain
                    text
    bos_id, add_bos the first token of a text, and whether a bare prompt begins with it
    eos_ids         every id that ends a turn
    special_ids     control tokens; user-defined tokens such as `<think>` are text and are not among them
    markers         added tokens that are more than white space, by id: what a person types is never read as
                    one of them
    silent_ids      control tokens that decoding leaves out: all but those that mark reasoning
    special_tokens  bos_token, eos_token and others by name, as chat templates expect them
    chat_template   raw Jinja text, or None for a base model
    chat_templates  that one as "default", and others by name
    n_embeddings    how many ids the model knows; it sets this
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        chat_templates: Mapping[str, str] | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self.chat_templates = dict(chat_templates or {})
        if chat_template is not None:
            self.chat_templates[DEFAULT] = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.n_embeddings = 1 << 32
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in self._added.items() if t.special)
        self.markers = {i: t.content for i, t in self._added.items() if not is_space(t.content)}
        ends = {i for text in TURN_ENDS if (i := backend.token_to_id(text)) in self.special_ids}
        reasoning = markers_in({t.content for t in self._added.values()})
        if END in reasoning:  # there it ends a channel, not a turn
            ends = {*ends, *self._ids_of(ANSWER_ENDS)} - {backend.token_to_id(END)}
            eos_ids = set(eos_ids) - {backend.token_to_id(END)}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | ends
        self.silent_ids = self.special_ids - self._ids_of(reasoning)
        self.written: dict[int, str] = {}  # other tokens that the chat template writes as markers
        self._decoding = Decoding.of(backend)
        self._pieces: dict[int, bytes | int | str | None] = {}
        self._prefixes = Prefixes(backend)
        self.lock = threading.Lock()  # for settings of the shared backend, such as `encode_special_tokens`
        _mark_special(backend, [t for i, t in self._added.items() if i in self.markers and not t.special])
        bound_memory(backend)

    @property
    def chat_template(self) -> str | None:
        """Template with which conversations without tools are written."""
        return self.chat_templates.get(DEFAULT)

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self.chat_templates = {} if source is None else {**self.chat_templates, DEFAULT: source}

    def _ids_of(self, texts: Iterable[str]) -> set[int]:
        return {i for text in texts if (i := self.backend.token_to_id(text)) is not None}

    def encode(
        self,
        text: str,
        *,
        special: bool = False,
        after: int | None = None,
        plain: Spans = (),
    ) -> list[int]:
        """Token ids of `text`, without a leading BOS.

        special=True reads the spelling of a marker (`<|im_start|>`) as that token: for rendered chat
        templates. special=False reads it as plain text, so that what a person typed cannot forge a turn.
        after: the id of the token that goes before, if any: SentencePiece begins a text with a space, and
        what stands behind most markers.
        plain: (start, end) of parts of `text` in which no marker is read all the same.

        Raises CheckpointError where the tokenizer fails on the text.
        """
        before = Before.MARKER if after in self._added else Before.TEXT
        if after is None:
            before = Before.NOTHING
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates, as a terminal in the wrong encoding sends them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self.lock:
            if special:
                ids, offsets = self._encode(text, True, before)
                ids = self._without(text, offsets(), ids, before, plain) if plain else ids
            else:
                ids = self._plain(text, before, self.markers)
        if not self.knows(ids):
            raise CheckpointError(
                f"The tokenizer has an id {max(ids)}, and the model has embeddings for {self.n_embeddings}.",
                "They do not belong together; choose another model.",
            )
        return ids

    def knows(self, ids: Iterable[int]) -> bool:
        """Whether the model has an embedding for each of the ids."""
        return max(ids, default=0) < self.n_embeddings

    def _encode(self, text: str, special: bool, before: Before) -> tuple[list[int], Offsets]:
        """Ids of `text`, and a call that gives where in it each begins and ends."""
        self.backend.encode_special_tokens = not special
        with self._prefixes.set(before):
            encoding = guarded(self.backend.encode, text, add_special_tokens=False)
        ids = encoding.ids
        n = self._first_matched(text, encoding) if before is Before.TEXT and self._prefixes.each else None
        if n is None:
            return ids, lambda: encoding.offsets
        # Only what goes on before the first marker begins without a space.
        offsets = encoding.offsets
        at = offsets[n][0]
        rest, more = self._encode(text[at:], special, Before.MARKER)
        return ids[:n] + rest, lambda: offsets[:n] + [(at + a, at + b) for a, b in more()]

    def _first_matched(self, text: str, encoding: tokenizers.Encoding) -> int | None:
        """Index of the first added token that was found by its spelling, and not put together from pieces."""
        if self._added.keys().isdisjoint(encoding.ids):
            return None
        for n, (i, (start, stop)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            token = self._added.get(i)
            if token is not None and not token.normalized and token.content in text[start:stop]:
                return n
        return None

    def _without(
        self, text: str, spans: list[tuple[int, int]], ids: list[int], before: Before, plain: Spans
    ) -> list[int]:
        """`ids` of `text`, but where a marker was read in a plain part: there everything between the
        template's own markers on both sides is encoded again, as plain text.
        """
        avoided = {**self.markers, **self.written}
        forged = {n for n, i in enumerate(ids) if i in avoided and _overlaps(text, spans[n], plain)}
        own = [n for n, i in enumerate(ids) if i in self.markers and n not in forged]
        out: list[int] = []
        first, start = 0, 0
        for n in (*own, len(ids)):
            stop = spans[n][0] if n < len(ids) else len(text)
            if forged.isdisjoint(range(first, n)):
                out += ids[first:n]
            else:
                where = Before.MARKER if first else before
                out += self._plain(text[start:stop], where, avoided, _slice(plain, start, stop))
            if n < len(ids):
                out.append(ids[n])
                first, start = n + 1, spans[n][1]
        return out

    def _plain(
        self, text: str, before: Before, avoided: Mapping[int, str], parts: Spans | None = None
    ) -> list[int]:
        """Ids of plain text. A marker that its pieces merge to is cut in two, everywhere or in `parts`."""
        ids, offsets = self._encode(text, False, before)
        if avoided.keys().isdisjoint(ids):
            return ids
        cuts = [
            start + 1
            for i, (start, stop) in zip(ids, offsets(), strict=True)
            if i in avoided and stop - start > 1 and (parts is None or _overlaps(text, (start, stop), parts))
        ]
        if not cuts:
            return ids
        out: list[int] = []
        at = 0
        for cut in (*cuts, len(text)):
            inner = None if parts is None else _slice(parts, at, cut)
            out += self._plain(text[at:cut], before, avoided, inner)
            at, before = cut, Before.TEXT
        return out

    def normalized_markers(self) -> set[str]:
        """Markers that are looked for in what a normalizer has changed; none where there is no normalizer."""
        if self.backend.normalizer is None:
            return set()
        return {t.content for i, t in self._added.items() if t.normalized and i in self.markers}

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special: bool = True,
        continued: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        """Text of `ids`, as the tokenizer's own decoder has it; bytes that are not UTF-8 become U+FFFD.

        SentencePiece vocabularies write "Hello" as "▁Hello", so a text's first space is dropped, unless
        `continued` says that other text goes before. shown: as for `StreamDecoder`.
        """
        stream = StreamDecoder(self, skip_special=skip_special, continued=continued, shown=shown)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for an id outside the vocabulary."""
        piece = self.piece(token_id)
        if isinstance(piece, str):
            return piece.encode()
        return b"" if piece is None else piece if isinstance(piece, bytes) else bytes([piece])

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes of text that one token becomes in the middle of an answer."""
        piece = self.piece(token_id)
        if not isinstance(piece, str) or not self._decoding.whole:
            return self.token_bytes(token_id)
        joiner = Joiner(self._decoding, continued=True)
        return (joiner.push(piece) + joiner.flush()).encode()

    def piece(self, token_id: int) -> bytes | int | str | None:
        """Piece of text that one token stands for (`Decoding.piece`); None outside the vocabulary."""
        try:
            return self._pieces[token_id]
        except KeyError:
            token = self._string(token_id)
            piece = self._pieces[token_id] = None if token is None else self._decoding.piece(token)
            return piece

    def first_piece(self, token_id: int) -> bytes | int | str | None:
        """Piece of text that one token stands for at the beginning of a text."""
        if not self._decoding.knows_first:
            return self.piece(token_id)
        token = self._string(token_id)
        return None if token is None else self._decoding.piece(token, first=True)

    def _string(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        return self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def to_json(self) -> str:
        """The content of a tokenizer.json, with the flags that the tokens had."""
        text = self.backend.to_str(pretty=False)
        if self.special_ids.issuperset(self.markers):
            return text
        content = json.loads(text)
        for token in content["added_tokens"]:
            token["special"] = token["id"] in self.special_ids
        return json.dumps(content, ensure_ascii=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (chat template included), special_tokens_map.json."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_templates:
            config["chat_template"] = chat_templates.to_config(self.chat_templates)
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        for name, content in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", self.special_tokens),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_hf(cls, folder: Path, n_embeddings: int | None = None) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, and the settings files beside it that exist.

        n_embeddings: how many tokens the model knows. Added tokens beyond are left out, as if nobody had
        added them (padding, mostly). Raises CheckpointError where the model needs one of them, or where the
        vocabulary itself is larger.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UnsupportedModelError(
                f"{folder} has no tokenizer.json.",
                "Only fast tokenizers are read; transformers' AutoTokenizer can save one.",
            )
        backend = load_backend(file)
        config, names = (
            _settings(folder / "tokenizer_config.json"),
            _settings(folder / "special_tokens_map.json"),
        )
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name) or names.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
        eos = [backend.token_to_id(special["eos_token"])] if "eos_token" in special else []
        for source in ("generation_config.json", "config.json"):
            value = _settings(folder / source).get("eos_token_id")
            eos += value if isinstance(value, list) else [value]
        bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):  # then the post-processor knows
            first = backend.encode("", add_special_tokens=True).ids[:1]
            add_bos = bos_id is not None and first == [bos_id]
        templates = chat_templates.from_folder(folder, config, _settings(folder / "chat_template.json"))
        if n_embeddings is not None:
            needed = [*templates.values(), special.get("bos_token", "") if add_bos else ""]
            backend = without_tokens(backend, n_embeddings, needed, str(file))
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=[i for i in eos if isinstance(i, int) and not isinstance(i, bool)],
            add_bos=add_bos,
            chat_templates=templates,
            special_tokens=special,
        )


class StreamDecoder:
    """Token ids to text while they arrive: what `push` returns is final, and joined up it is what `decode`
    returns.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continued: bool = False,
        shown: frozenset[int] = frozenset(),
    ):
        """shown: control tokens that are text here, as those that mark calls."""
        self._piece = tokenizer.piece
        self._skip = tokenizer.silent_ids - shown if skip_special else frozenset()
        self._joiner = Joiner(tokenizer._decoding, continued)
        self._first = None if continued else tokenizer.first_piece

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known: an unfinished character waits for the rest of
        it, and so does a run of single bytes.
        """
        if token_id in self._skip:
            return ""
        piece = (self._first or self._piece)(token_id)
        if piece is None:
            return ""
        self._first = None
        return self._joiner.push(piece)

    def fork(self) -> StreamDecoder:
        """Another one at the same place, which goes on by itself."""
        other = copy.copy(self)
        other._joiner = self._joiner.fork()
        return other

    def flush(self) -> str:
        """Text that was still held back at the end of the stream."""
        return self._joiner.flush()


def _mark_special(backend: tokenizers.Tokenizer, tokens: list[tokenizers.AddedToken]) -> None:
    """Let the backend's switch for special tokens hold for these too."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized")
    changed = [AddedToken(t.content, special=True, **{f: getattr(t, f) for f in flags}) for t in tokens]
    if changed:
        backend.add_special_tokens(changed)


def _overlaps(text: str, span: tuple[int, int], parts: Spans) -> bool:
    """Whether a token, without the white space that it took along, lies in one of the parts."""
    start, stop = span
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    stop -= len(text[start:stop]) - len(text[start:stop].rstrip())
    at = bisect.bisect_left(parts, (stop, 0))  # the first part that begins behind the token
    return at > 0 and parts[at - 1][1] > start


def _slice(parts: Spans, start: int, stop: int) -> list[tuple[int, int]]:
    """The parts within text[start:stop], by their places in it."""
    first = max(0, bisect.bisect_left(parts, (start, 0)) - 1)
    last = bisect.bisect_left(parts, (stop, 0))
    return [(a - start, b - start) for a, b in parts[first:last] if b > start]


def is_space(token: str) -> bool:
    """Whether an added token is nothing but white space: indentation, blank lines."""
    return not token.replace(_SPACE, " ").strip()


def _settings(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file} is damaged: {one_line(e)}.", "Pull the model again, or repair the file."
        ) from e
