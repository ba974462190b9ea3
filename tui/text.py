"""Strangers' text on a terminal: what is left of it, how wide it is, where it breaks.

A *span* is (text, style), a *line* is a list of spans. A style is a string of atoms ("strong link"), which
`theme.py` turns into colours; an atom that begins with @ names an action for a click.
"""

from __future__ import annotations

import re

from rich.cells import cell_len

from tinychat.base.terminal import clean as clean
from tinychat.process.address import split_name

Span = tuple[str, str]
Line = list[Span]

_WORD = re.compile(r"\S+[^\S\n]*|[^\S\n]+")


def width_of(text: str) -> int:
    """Terminal cells."""
    return len(text) if text.isascii() else cell_len(text)


def line_width(line: Line) -> int:
    """Terminal cells of a line."""
    return sum(width_of(text) for text, _ in line)


def break_offsets(text: str, width: int) -> list[int]:
    """Offsets at which lines of at most `width` cells begin in `text` (no newlines in it), after the first;
    between words if possible.
    """
    offsets: list[int] = []
    used = 0
    for match in _WORD.finditer(text):
        word = match[0]
        ink = width_of(word.rstrip())
        if used + ink <= width:
            used += width_of(word)
            continue
        at = match.start()
        if used:
            offsets.append(at)
        if ink <= width:
            used = width_of(word)
            continue
        used = 0
        if word.isascii():
            cuts = range(at + width, at + len(word.rstrip()), width)
            offsets.extend(cuts)
            used = at + len(word) - (cuts[-1] if cuts else at)
            continue
        for i, char in enumerate(word, at):
            w = cell_len(char)
            if used + w > width:
                offsets.append(i)
                used = 0
            used += w
    return offsets


def cut(line: Line, offsets: list[int]) -> list[Line]:
    """The line in pieces, divided at character offsets."""
    out: list[Line] = []
    piece: Line = []
    at = 0
    ends = iter([*offsets, 1 << 60])
    end = next(ends)
    for text, style in line:
        while at + len(text) > end:
            n = end - at
            if n:
                piece.append((text[:n], style))
            out.append(piece)
            piece, text, at = [], text[n:], end
            end = next(ends)
        if text:
            piece.append((text, style))
            at += len(text)
    out.append(piece)
    return out


def wrap(line: Line, width: int) -> list[Line]:
    """Lines of at most `width` cells, broken between words, without the spaces at their ends."""
    width = max(1, width)
    text = "".join(t for t, _ in line)
    if len(text) * 2 <= width or width_of(text) <= width:
        return [line]
    pieces = cut(line, break_offsets(text, width))
    for piece in pieces:
        while piece and not (stripped := piece[-1][0].rstrip()):
            piece.pop()
        if piece and stripped != piece[-1][0]:
            piece[-1] = (stripped, piece[-1][1])
    return pieces


def fold(line: Line, width: int) -> list[Line]:
    """Lines of at most `width` cells, broken anywhere: nothing is lost and columns stay columns."""
    width = max(1, width)
    text = "".join(t for t, _ in line)
    if width_of(text) <= width:
        return [line]
    if text.isascii():
        return cut(line, list(range(width, len(text), width)))
    offsets, used = [], 0
    for i, char in enumerate(text):
        w = cell_len(char)
        if used + w > width:
            offsets.append(i)
            used = 0
        used += w
    return cut(line, offsets)


def pad(line: Line, width: int, style: str) -> Line:
    """The line filled up to `width` cells."""
    missing = width - line_width(line)
    return [*line, (" " * missing, style)] if missing > 0 else line


def plain(line: Line) -> str:
    """The text alone."""
    return "".join(text for text, _ in line)


def shorten(text: str, width: int) -> str:
    """One line of at most `width` cells, ending in … when something was cut."""
    text = " ".join(text.split())
    if width_of(text) <= width:
        return text
    while text and width_of(text) > width - 1:
        text = text[: -max(1, (width_of(text) - width + 1) // 2)]
    return text + "…"


def short_name(model: str) -> str:
    """A path's last part, a served model without its server; other names as they are."""
    id, server = split_name(model)
    if server is not None:
        return shorten(id or server.place, 32)
    name = model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".", "~")) else model
    return shorten(name.removesuffix(".gguf"), 32)
