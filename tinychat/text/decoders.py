"""How token strings become text: a backend's decoder, one token at a time."""

from __future__ import annotations

import codecs
import copy
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tinychat.base.errors import UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x\+?([0-9A-Fa-f]{1,2})>")
_LONGEST_REPLACEMENT = 64
_LONGEST_STRIP = 1024
SUPPORTED = "Supported: byte-level BPE, and SentencePiece with byte fallback."


@dataclass(frozen=True)
class Decoding:
    """The steps of a decoder, in the order in which every known family has them.

    each     what is done to each token's string by itself; the flag says whether it is the text's first
    joining  "ByteLevel" (characters stand for bytes), "ByteFallback" (tokens <0x00>…<0xFF> are bytes) or ""
    whole    what is done to the joined text, as makers of stream steps
    """

    each: tuple[Callable[[str, bool], str], ...]
    joining: str
    whole: tuple[Callable[[], Any], ...]
    knows_first: bool  # whether a token that begins a text may read differently
    table: dict[str, int] | None  # the byte that each character stands for

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Decoding:
        """Read from the backend. Raises UnsupportedModelError, by name, for what no chat model has."""
        each: list[Callable[[str, bool], str]] = []
        whole: list[Callable[[], Any]] = []
        joining, fused, knows_first = "", False, False
        for step in _flat(json.loads(backend.decoder.__getstate__()) if backend.decoder else {}):
            kind = step.get("type")
            if kind in ("ByteLevel", "ByteFallback") and not joining and not fused:
                joining, fused = kind, kind == "ByteLevel"
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace" and not joining and not fused:
                each.append(_replace(step))
            elif kind == "Replace" and (pattern := _one_character(step)):
                whole.append(partial(_Replace, pattern, step["content"]))
            elif kind == "Metaspace" and not joining and not fused:
                drop = step.get("prepend_scheme", "always") != "never"
                each.append(_metaspace(step["replacement"], drop))
                knows_first |= drop
            elif kind == "Strip" and not joining and not fused:
                each.append(_strip(step))
            elif kind == "Strip" and fused and max(step["start"], step["stop"]) <= _LONGEST_STRIP:
                whole.append(partial(_Strip, step["content"], step["start"], step["stop"]))
            else:
                raise UnsupportedModelError(
                    f"The tokenizer's decoder {kind or 'none'} is not supported here.", SUPPORTED
                )
        if not joining and not each:
            raise UnsupportedModelError("The tokenizer has no decoder that is supported.", SUPPORTED)
        table = None
        if joining == "ByteLevel":
            table = byte_of_char()
        return cls(tuple(each), joining, tuple(whole), knows_first, table)

    def piece(self, token: str, first: bool = False) -> bytes | int | str:
        """Piece of a token: bytes of UTF-8 that may be part of a character (ByteLevel), one byte of
        a run of bytes (ByteFallback), or text. first: the token begins a text.
        """
        for step in self.each:
            token = step(token, first)
        if self.table is not None:
            try:
                return bytes([self.table[c] for c in token])
            except KeyError:
                return token.encode()
        if self.joining == "ByteFallback" and len(token) == 6 and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token


class Joiner:
    """Pieces to text while they arrive: what `push` returns is final.

    An unfinished character waits for the rest of it. A run of byte tokens waits for its end: if the run as a
    whole is not UTF-8, each of its bytes becomes U+FFFD.

    continued: other text goes before, so that nothing is stripped from the beginning.
    """

    def __init__(self, decoding: Decoding, continued: bool):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._whole = [make() for make in decoding.whole]
        if continued:
            for step in self._whole:
                step.continued()

    def fork(self) -> Joiner:
        """Another one at the same place, which goes on by itself."""
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        other._run = bytearray(self._run)
        other._whole = [copy.copy(step) for step in self._whole]
        return other

    def push(self, piece: bytes | int | str) -> str:
        if isinstance(piece, bytes):
            text = self._utf8.decode(piece)
        elif isinstance(piece, int):
            self._run.append(piece)
            return ""
        else:
            text = self._end_run() + piece if self._run else piece
        for step in self._whole:
            text = step.push(text)
        return text

    def flush(self) -> str:
        text = self._end_run() + self._utf8.decode(b"", final=True)
        for step in self._whole:
            text = step.push(text) + step.flush()
        return text

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


class _Replace:
    """One character for another text, wherever it is."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def continued(self) -> None:
        pass

    def push(self, text: str) -> str:
        return text.replace(self.old, self.new)

    def flush(self) -> str:
        return ""


class _Strip:
    """Up to `start` characters from the beginning and `stop` from the end, if they are `content`."""

    def __init__(self, content: str, start: int, stop: int):
        self.content, self.start, self.stop = content, start, stop
        self.held = ""

    def continued(self) -> None:
        self.start = 0

    def push(self, text: str) -> str:
        if self.start and text:
            rest = text.lstrip(self.content)
            stripped = min(self.start, len(text) - len(rest))
            text = text[stripped:]
            self.start = 0 if text else self.start - stripped
        if not self.stop:
            return text
        text = self.held + text
        n = min(self.stop, len(text) - len(text.rstrip(self.content)))
        text, self.held = text[: len(text) - n], text[len(text) - n :]
        return text

    def flush(self) -> str:
        self.held = ""
        return ""


def _flat(step: dict) -> list[dict]:
    if step.get("type") == "Sequence":
        return [s for inner in step["decoders"] for s in _flat(inner)]
    return [step]


def _one_character(step: dict) -> str | None:
    pattern = step["pattern"].get("String")
    fits = pattern is not None and len(pattern) == 1 and len(step["content"]) <= _LONGEST_REPLACEMENT
    return pattern if fits else None


def _replace(step: dict) -> Callable[[str, bool], str]:
    pattern, content = step["pattern"].get("String"), step["content"]
    if not pattern or len(content) > _LONGEST_REPLACEMENT:
        raise UnsupportedModelError(
            "The tokenizer's decoder replaces what only a regular expression, or a long text, describes.",
            SUPPORTED,
        )
    return lambda token, _: token.replace(pattern, content)


def _metaspace(replacement: str, drop: bool) -> Callable[[str, bool], str]:
    return lambda token, first: token.replace(replacement, "" if drop and first else " ")


def _strip(step: dict) -> Callable[[str, bool], str]:
    def strip(token: str, _: bool) -> str:
        stream = _Strip(step["content"], step["start"], step["stop"])
        return stream.push(token)

    return strip


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
