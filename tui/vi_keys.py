"""Vi's keys in a text area: the mode, and what a key changes (`vi.py` knows what that is)."""

from __future__ import annotations

from textual import events
from textual.widgets import TextArea

from tinychat.tui.vi import Edit, Vi, last_place, line_start

NORMAL = "NORMAL"


class ViArea(TextArea):
    """A text area that has vi's keys where `vi` is set."""

    vi: Vi | None = None

    def beyond(self, step: int) -> None:
        """Up (-1) or down (1) behind the ends of the text."""

    def busy(self) -> bool:
        """Whether escape has something else to do first."""
        return False

    def vi_key(self, event: events.Key) -> bool:
        """Whether the key was vi's."""
        vi = self.vi
        if vi is None:
            return False
        if vi.insert:
            if event.key != "escape" or self.busy():
                return False
            self.set_insert(False)
            at = self.cursor_place()
            self._to(max(line_start(self.text, at), at - 1))
            return True
        if event.key == "escape" and vi.begun:
            vi.forget()
            return True
        if not event.is_printable or event.character is None:
            return False
        done = vi.press(event.character, self.text, self.cursor_place())
        if isinstance(done, Edit):
            self._change_to(done.text)
            self._to(done.at)
            self.set_insert(done.insert)
        elif done == "undo":
            self.undo()
            self._to(last_place(self.text, self.cursor_place()))
        elif done is not None:
            self.beyond(-1 if done == "up" else 1)
        return True

    def set_insert(self, insert: bool) -> None:
        """The mode, which is shown."""
        if self.vi is not None:
            self.vi.insert = insert
            self.vi.forget()
            self.border_subtitle = "" if insert else NORMAL

    def cursor_place(self) -> int:
        """Number of characters before the cursor."""
        row, column = self.cursor_location
        return sum(len(line) + 1 for line in self.text.split("\n")[:row]) + column

    def _to(self, offset: int) -> None:
        before = self.text[:offset]
        self.move_cursor((before.count("\n"), len(before) - line_start(before, len(before))))

    def _change_to(self, text: str) -> None:
        """Change what differs, so that it can be undone."""
        old = self.text
        if text == old:
            return
        most = min(len(old), len(text))
        start = next((i for i in range(most) if old[i] != text[i]), most)
        end = next((i for i in range(most - start) if old[-1 - i] != text[-1 - i]), most - start)
        places = []
        for at in (start, len(old) - end):
            before = old[:at]
            places.append((before.count("\n"), len(before) - line_start(before, len(before))))
        self.replace(text[start : len(text) - end], *places, maintain_selection_offset=False)
        self.history.checkpoint()
