"""Hints at keys: whole ones on each line, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinychat.tui.text import Line, width_of, wrap
from tinychat.tui.widgets.lines import Lines

BETWEEN = " · "


def hint_lines(hints: Sequence[str], width: int) -> list[str]:
    """Hints side by side, as many to a line as fit; none is broken over two lines."""
    out: list[str] = []
    for hint in hints:
        if out and width_of(out[-1]) + len(BETWEEN) + width_of(hint) <= width:
            out[-1] += BETWEEN + hint
        else:
            out.append(hint)
    return out


class Hints(Lines):
    """Shows some hints, faint, under a text."""

    def __init__(self, hints: Sequence[str], text: str = "", **options: Any):
        super().__init__(**options)
        self.hints, self.text = tuple(hints), text

    @property
    def allow_select(self) -> bool:
        return False

    def show(self, hints: Sequence[str]) -> None:
        """Others in their place."""
        if tuple(hints) != self.hints:
            self.hints = tuple(hints)
            self.refresh(layout=True)

    def layout_lines(self, width: int) -> list[Line]:
        """The lines at that width."""
        text: list[Line] = [*wrap([(self.text, "")], width), []] if self.text else []
        return [*text, *([(line, "faint")] for line in hint_lines(self.hints, width))]
