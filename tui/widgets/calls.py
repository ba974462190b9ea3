"""Lines of a call of a tool, and of what it gave: one each, until they are opened."""

from __future__ import annotations

import json
from typing import Any

from tinychat.tui.text import Line, clean, fold, shorten

LONGEST = 20_000  # characters that are laid out of an open one


def call_lines(call: dict[str, Any], where: str, is_open: bool, width: int) -> list[Line]:
    """A call. `where`: what it is of."""
    given = call["function"]["arguments"]
    head = f"{'▾' if is_open else '▸'} called {clean(where)}"
    if not is_open:
        head = shorten(f"{head} {' '.join(clean(given).split())}", width)
        return [[(head, "thought @unfold")]]
    return [[(shorten(head, width), "thought @unfold")], *_indented(pretty(given), width)]


def result_lines(text: str, is_open: bool, width: int) -> list[Line]:
    """What a call gave."""
    lines = text.strip().split("\n")
    more = f" … {len(text):,} characters" if len(lines) > 1 or len(lines[0]) > width else ""
    if not is_open:
        first = shorten(clean(lines[0][:1000]) or "(nothing)", max(8, width - len(more) - 6))
        return [[("  ▸ ↳ ", "thought @unfold"), (first, "faint @unfold"), (more, "faint @unfold")]]
    return [[("  ▾ ↳ result", "thought @unfold")], *_indented(text, width)]


def pretty(arguments: str) -> str:
    """Arguments of a call in full, a line each."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):  # from a damaged store
        return arguments


def _indented(text: str, width: int) -> list[Line]:
    shown = clean(text[:LONGEST])
    out: list[Line] = []
    for line in shown.expandtabs(4).split("\n"):
        out += [[("    ", ""), *piece] for piece in fold([(line, "faint")], max(8, width - 4))]
    if len(text) > LONGEST:
        out.append([(f"    … {len(text) - LONGEST:,} characters more: /save FILE writes all", "faint")])
    return out
