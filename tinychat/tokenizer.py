"""Text to token ids and back, and back again while a stream is still arriving."""

from __future__ import annotations

import codecs
import functools
import json
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

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
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece writes a space as this


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a chat needs around it.

    backend         the wrapped tokenizer
    bos_id, add_bos the first token of a text, and whether a bare prompt begins with it
    eos_ids         every id that ends a turn
    special_ids     control tokens; user-defined tokens such as `<think>` are text and are not among them
    special_tokens  bos_token, eos_token and others by name, as chat templates expect them
    chat_template   raw Jinja text, or None for a base model
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        ends = {i for text in TURN_ENDS if (i := backend.token_to_id(text)) in self.special_ids}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | ends
        self._byte_level, self._strip_first_space = _decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self._lock = threading.Lock()  # `encode_special_tokens` is a setting of the shared backend

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, without a leading BOS.

        special=True reads the spelling of a control token (`<|im_start|>`) as that token: for rendered chat
        templates. special=False reads it as plain text, so that what a person typed cannot forge a turn.
        """
        with self._lock:
            self.backend.encode_special_tokens = not special
            try:
                return self.backend.encode(text, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                # Lone surrogates, as a terminal in the wrong encoding sends them.
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continued: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        SentencePiece vocabularies write "Hello" as "▁Hello", so a text's first space is dropped, unless
        `continued` says that other text goes before.
        """
        stream = StreamDecoder(self, skip_special=skip_special, continued=continued)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._to_bytes(token_id)
        return found

    def _to_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self._byte_level:
            table = byte_of_char()
            try:
                return bytes([table[c] for c in token])
            except KeyError:
                return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self.backend.to_str(pretty=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (chat template included), special_tokens_map.json."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        for name, content in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", self.special_tokens),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_hf(cls, folder: Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, and the settings files beside it that exist."""
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
        eos = {backend.token_to_id(special["eos_token"])} if "eos_token" in special else set()
        for source in ("generation_config.json", "config.json"):
            value = _settings(folder / source).get("eos_token_id")
            eos.update(value if isinstance(value, list) else [value])
        bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):  # then the post-processor knows
            first = backend.encode("", add_special_tokens=True).ids[:1]
            add_bos = bos_id is not None and first == [bos_id]
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=[i for i in eos if isinstance(i, int) and not isinstance(i, bool)],
            add_bos=add_bos,
            chat_template=_hf_template(folder, config),
            special_tokens=special,
        )


class StreamDecoder:
    """Token ids to text while they arrive: what `push` returns is final, and joined up it is what `decode`
    returns.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continued: bool = False):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = tokenizer._strip_first_space and not continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known: an unfinished character waits for the rest of
        it.
        """
        if token_id in self._skip:
            return ""
        return self._first(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What was still waiting, at the end of the stream."""
        return self._first(self._utf8.decode(b"", final=True))

    def _first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text


@functools.cache
def char_of_byte() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is a visible Latin-1 character, else from
    U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@functools.cache
def byte_of_char() -> dict[str, int]:
    """The inverse of `char_of_byte`."""
    return {c: b for b, c in char_of_byte().items()}


def load_backend(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises CheckpointError where it is damaged."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exception, and PanicException that is not even that
        raise CheckpointError(
            f"{file} is not a tokenizer that can be read: {_one_line(e)}.",
            "The file is damaged, or made by a newer version of tokenizers; pull it again.",
        ) from e


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(byte-level, drop the first space): how token strings become bytes, read from the backend's decoder."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = {s.get("type") for s in steps}
    if "ByteLevel" in kinds:
        return True, False
    if not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise UnsupportedModelError(
            f"The tokenizer's decoder {', '.join(map(str, kinds))} is not supported.",
            "Supported: byte-level BPE, and SentencePiece with byte fallback.",
        )
    strip = any(s.get("type") == "Strip" and s.get("content") == " " and s.get("start") for s in steps)
    metaspace = [s for s in steps if s.get("type") == "Metaspace"]
    return False, strip or any(s.get("prepend_scheme", "always") != "never" for s in metaspace)


def _settings(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
        return content
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file} is damaged: {_one_line(e)}.", "Pull the model again, or repair the file."
        ) from e


def _hf_template(folder: Path, config: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is None:
        template = _settings(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
