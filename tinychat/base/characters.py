"""Characters that an encoding does not have: text that comes becomes whole, text that goes becomes printable.

Loads nothing but codecs: every command imports it first.
"""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata
from typing import Any

ERRORS = "tinychat.lookalike"  # the name of the error handler, for `open`, `decode`, `reconfigure`

_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN = {
    ord(char): plain
    for chars, plain in (
        ("─━═—–‹›▕▏", "-----<>||"),
        ("│┃║▌▎█", "||||||"),
        ("╭╮╰╯├┤┬┴┼┌┐└┘", "+" * 13),
        ("•●○·…×✓✗▸▾", "**o..xvx>v"),
        ("▲▼◀▶→←↑↓␡", "^v<>><^v?"),
        ("“”‘’«»", "\"\"''<>"),
    )
    for char, plain in zip(chars, plain, strict=True)
}


def whole(text: str) -> str:
    """The text without surrogates: pairs are joined, a byte that no decoder understood is read as Latin-1.

    What is left of a character that cannot be known becomes U+FFFD.
    """
    if not _SURROGATE.search(text):
        return text
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if text else ""
    return _SURROGATE.sub(lambda m: _of_byte(ord(m[0]) - 0xDC00), joined)


def _of_byte(byte: int) -> str:
    return chr(byte) if 0xA0 <= byte <= 0xFF else "\ufffd"


def _lookalike(e: UnicodeError) -> tuple[str | bytes, int]:
    """Decoding: bytes as Latin-1 has them. Encoding: as many cells of ASCII as the character takes."""
    if isinstance(e, UnicodeDecodeError):
        return "".join(map(_of_byte, e.object[e.start : e.end])), e.end
    if not isinstance(e, UnicodeEncodeError):
        raise e
    bad = e.object[e.start : e.end]
    if e.encoding.lower() in ("utf-8", "utf8"):  # only surrogates cannot be written there
        return whole(bad).encode(), e.end
    return "".join(map(_plain, bad)), e.end


def _plain(char: str) -> str:
    plain = char.translate(_PLAIN)
    if plain.isascii():
        return plain
    base = unicodedata.normalize("NFKD", char)[:1]
    if base.isascii() and base.isprintable() and base:
        return base
    if unicodedata.combining(char):
        return ""
    return "??" if unicodedata.east_asian_width(char) in "WF" else "?"


def make_printable(*streams: Any) -> None:
    """Have text streams take every text, whatever their encoding; standard input understand every byte."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


codecs.register_error(ERRORS, _lookalike)


def is_unicode(stream: Any) -> bool:
    """Whether every character can be written there."""
    encoding = getattr(stream, "encoding", None) or sys.getdefaultencoding()
    return codecs.lookup(encoding).name.startswith("utf")
