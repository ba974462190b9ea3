"""Messages that wait until the running answer has ended."""

from __future__ import annotations

from tinychat.tui.text import Line, clean, shorten
from tinychat.tui.widgets.lines import Lines
from tinychat.tui.words import Words


class Queue(Lines):
    """What is said next, the oldest first; a line each."""

    def __init__(self) -> None:
        super().__init__(id="queue")
        self.words: list[Words] = []
        self.display = False

    @property
    def allow_select(self) -> bool:
        return False

    def put(self, words: Words) -> None:
        """One more, behind the others."""
        self.words.append(words)
        self._show()

    def take(self, at: int) -> Words:
        """Take one out: 0 is the oldest, -1 the newest."""
        words = self.words.pop(at)
        self._show()
        return words

    def _show(self) -> None:
        self.display = bool(self.words)
        self.refresh(layout=True)

    def layout_lines(self, width: int) -> list[Line]:
        out: list[Line] = []
        for words in self.words:
            said = clean(" ".join([*words.text.split(), *(f"+{a['name']}" for a in words.attachments)]))
            hint = "  ↑ takes it back" if words is self.words[-1] else ""
            out.append(
                [
                    ("next: ", "marker"),
                    (shorten(said, max(8, width - 6 - len(hint))), "faint"),
                    (hint, "faint"),
                ]
            )
        return out
