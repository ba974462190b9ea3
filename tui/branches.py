"""The tree of a chat as lines: for the panel over the screen and for a terminal without one."""

from __future__ import annotations

from collections.abc import Iterable

from tinychat.chats.outline import RAILS, Branch, here
from tinychat.tui.text import Line, clean, line_width, pad, short_name, shorten, width_of

ROOM = 16  # cells that the words have at least, whatever stands behind them
LONGEST_MODEL = 20


def headline(branches: list[Branch]) -> str:
    """How many there are, and the model, where it is the same for all."""
    models = {short_name(clean(b.model)) for b in branches if b.model}
    n = len(branches)
    count = "1 branch" if n == 1 else f"{n} branches"
    return f"{count} · {models.pop()}" if len(models) == 1 else count


def rows(branches: list[Branch], width: int, shown: Iterable[Branch] | None = None) -> list[Line]:
    """A line of at most `width` cells for each branch: number, place in the tree, first words; model (where
    they differ) and rate at the end. ● is where the conversation is. shown: these of them, without places.
    """
    at = here(branches)
    several = len({b.model for b in branches if b.model}) > 1
    digits = len(str(len(branches)))
    deepest = max(1, min(RAILS, (width - ROOM) // 8))
    out = []
    for b in branches if shown is None else shown:
        left: Line = [(f"{b.number:>{digits}} ", "faint"), ("● " if b is at else "  ", "marker")]
        if shown is None:
            left.append((_rails(b, deepest), "faint"))
        if b.is_question:
            left.append(("▌ ", "userbar"))
        facts = _facts(b, several)
        room = width - line_width(left)
        while facts and room - width_of(" · ".join(facts)) - 2 < min(ROOM, room):
            facts = facts[1:]  # the rate stays longest
        right: Line = [(" · ".join(facts), "faint")] if facts else []
        free = max(1, room - line_width(right) - (2 if right else 0))
        left.append((shorten(clean(b.words), free), "strong" if b.on_path else ""))
        out.append([*(pad(left, width - line_width(right), "") if right else left), *right])
    return out


def _rails(b: Branch, deepest: int) -> str:
    """Lines that lead to a branch, as wide as `deepest` levels at most."""
    if not b.depth:
        return ""
    shown = b.rails[-min(b.depth, deepest) :]
    beyond = b.depth - len(shown)
    return (
        (f"⋯{beyond} " if beyond else "")
        + "".join("│ " if more else "  " for more in shown[:-1])
        + ("├ " if shown[-1] else "└ ")
    )


def _facts(b: Branch, several: bool) -> list[str]:
    out = [shorten(short_name(clean(b.model)), LONGEST_MODEL)] if several and b.model else []
    return [*out, f"{b.rate:.1f} tok/s"] if b.rate else out
