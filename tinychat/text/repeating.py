"""Answers that run in a circle: the same tokens again and again."""

from __future__ import annotations

from array import array

WINDOW = 200  # tokens that are one period, repeated, when an answer is said to run in a circle
LONGEST = 66  # tokens of a period: the window has it three times
EVERY = 8  # tokens between two looks
FENCES = ("```", "~~~")


class Circle:
    """Hears an answer token by token; `closed` when its last WINDOW tokens repeat one period.

    Code and tables may repeat rightly (a matrix of zeros, a dump, rows that are alike), so nothing is said of
    an answer while it is inside of a fence, an indented block or a table.
    """

    def __init__(self) -> None:
        self.closed = False
        self._ids = array("i")
        self._since = 0  # tokens heard where repeating was not right
        self._line = ""
        self._fence = ""  # that is open

    def push(self, token: int, text: str) -> bool:
        """One more token and what it wrote; whether the circle is closed."""
        self._ids.append(token)
        for part in text.splitlines(keepends=True):
            self._line = (self._line + part)[:80]  # its beginning says what it is
            if part.endswith("\n"):
                self._end_line()
        self._since = 0 if self._may_repeat else self._since + 1
        if len(self._ids) >= 4 * WINDOW:
            del self._ids[: -2 * WINDOW]
        if self._since >= WINDOW and self._since % EVERY == 0:
            last = self._ids[-WINDOW:]
            self.closed = self.closed or _repeats(last.tobytes(), last.itemsize)
        return self.closed

    @property
    def _may_repeat(self) -> bool:
        return bool(self._fence) or self._line.startswith(("|", "    ", "\t", *FENCES))

    def _end_line(self) -> None:
        line = self._line.strip()
        if self._fence:
            if line.startswith(self._fence):
                self._fence = ""
        elif line.startswith(FENCES):
            self._fence = line[:3]
        self._line = ""


def _repeats(data: bytes, size: int) -> bool:
    """Whether all of it repeats one period of at most LONGEST tokens."""
    return any(data[n * size :] == data[: -n * size] for n in range(1, LONGEST + 1))
