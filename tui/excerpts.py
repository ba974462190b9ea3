"""Excerpts on one line of a given number of cells, with what was looked for in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby, repeat

from tinychat.chats.finding import Piece
from tinychat.tui.text import Line, clean, width_of

FOUND = "found"  # the style of what was looked for
BEFORE = 0.35  # share of the context that stands before it, where there is enough on both sides
SEEN = 3  # characters that a cell may take: accents follow their letters
_SPACES = re.compile(r"\s+")
JOINERS = "\u200d\ufe0e\ufe0f"


def clusters(text: str) -> list[str]:
    """Characters as they are seen: what has no width of its own belongs to the one before it."""
    out: list[str] = []
    for char in text:
        joins = out and (char in JOINERS or out[-1][-1] == "\u200d" or (width_of(char) == 0))
        if joins or (out and "\U0001f3fb" <= char <= "\U0001f3ff"):
            out[-1] += char
        else:
            out.append(char)
    return out


def one_line(pieces: Iterable[Piece]) -> list[tuple[str, bool]]:
    """Harmless clusters, each with whether it was looked for; a run of spaces and new lines is one space."""
    out: list[tuple[str, bool]] = []
    for text, found in pieces:
        text = clean(text)
        if text.isascii():  # a character each
            text = _SPACES.sub(" ", text)
            out += zip(text[1:] if text[:1] == " " and _ends_in_space(out) else text, repeat(found))
            continue
        for cluster in clusters(text):
            if not cluster.isspace():
                out.append((cluster, found))
            elif not _ends_in_space(out):
                out.append((" ", found))
    return out


def _ends_in_space(cells: list[tuple[str, bool]]) -> bool:
    return not cells or cells[-1][0] == " "


def fitted(pieces: Iterable[Piece], width: int) -> Line:
    """At most `width` cells of an excerpt, with (the beginning of) what was found in view."""
    cells = one_line(_near(list(pieces), width))
    sizes = [1 if c.isascii() else width_of(c) for c, _ in cells]
    if sum(sizes) <= width:
        return _spans(cells)
    start = next((i for i, (_, found) in enumerate(cells) if found), 0)
    end = next((i for i in range(start, len(cells)) if not cells[i][1]), len(cells))
    while end > start + 1 and sum(sizes[start:end]) > width - 2:
        end -= 1
    free = width - sum(sizes[start:end]) - 2  # an ellipsis at each end
    before = min(sum(sizes[:start]), int(free * BEFORE))
    after = min(sum(sizes[end:]), free - before)
    before = min(sum(sizes[:start]), free - after)
    first, last = start, end
    while first and sizes[first - 1] <= before:
        first -= 1
        before -= sizes[first]
    while last < len(cells) and sizes[last] <= after:
        after -= sizes[last]
        last += 1
    cut_before = first > 0 and cells[first][0] != "…"
    cut_after = last < len(cells)
    return [
        *([("…", "")] if cut_before else []),
        *_spans(cells[first:last]),
        *([("…", "")] if cut_after else []),
    ]


def _near(pieces: list[Piece], width: int) -> list[Piece]:
    """Those pieces that may be seen: a line's width of characters, a few times, around what was found."""
    first = next((i for i, (_, found) in enumerate(pieces) if found), 0)
    most = SEEN * width
    out: list[Piece] = []
    for text, found in pieces[:first]:
        out.append((text if len(text) <= most else "…" + text[-most:], found))
    for text, found in pieces[first:]:
        out.append((text if len(text) <= most else text[:most] + "…", found))
        most -= len(text)
        if most <= 0:
            break
    return out


def _spans(cells: list[tuple[str, bool]]) -> Line:
    return [
        ("".join(c for c, _ in run), FOUND if found else "")
        for found, run in groupby(cells, key=lambda c: c[1])
    ]


def marked(line: Line, spans: list[tuple[int, int]]) -> Line:
    """The line with the style of what was looked for at these places of its text."""
    out: Line = []
    at = 0
    for text, style in line:
        done = 0
        for a, b in spans:
            a, b = max(a - at, done), min(b - at, len(text))
            if a < b:
                out += [(text[done:a], style), (text[a:b], f"{style} {FOUND}".strip())]
                done = b
        out.append((text[done:], style))
        at += len(text)
    return [span for span in out if span[0]]
