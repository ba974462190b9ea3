"""Answers that run in a circle: the same tokens again and again."""

from __future__ import annotations

from array import array
from collections import deque

WINDOW = 200  # tokens that are one period, repeated, when an answer is said to run in a circle
LONGEST = 66  # tokens of a period: the window has it three times
EVERY = 8  # tokens between two looks
WIDE = 1200  # the window in code and tables
LONGEST_WIDE = 300  # tokens of a period there,
FEWEST_LINES = 3  # which has so many different lines: rows that are alike are no circle
FENCES = ("```", "~~~")


class Circle:
    """Hears an answer token by token; `closed` when its last WINDOW tokens repeat one period.

    Code and tables may repeat rightly (a matrix of zeros, a dump, rows that are alike): inside of a fence, an
    indented block or a table only several lines that come again and again for WIDE tokens are a circle.
    """

    def __init__(self) -> None:
        self.closed = False
        self._ids = array("i")
        self._since = 0  # tokens heard where repeating was not right
        self._heard = 0
        self._line = ""
        self._lines: deque[tuple[int, str]] = deque(maxlen=LONGEST_WIDE)  # tokens heard at its end, beginning
        self._fence = ""  # that is open

    def push(self, token: int, text: str) -> bool:
        """One more token and what it wrote; whether the circle is closed."""
        self._ids.append(token)
        self._heard += 1
        for part in text.splitlines(keepends=True):
            self._line = (self._line + part)[:80]  # its beginning says what it is
            if part.endswith("\n"):
                self._end_line()
        self._since = 0 if self._may_repeat else self._since + 1
        if len(self._ids) >= 2 * WIDE:
            del self._ids[:-WIDE]
        if self._since >= WINDOW and self._since % EVERY == 0:
            self.closed = self.closed or _period(self._ids[-WINDOW:], LONGEST) > 0
        if self._heard >= WIDE and self._heard % (8 * EVERY) == 0:
            n = _period(self._ids[-WIDE:], LONGEST_WIDE)
            lines = {line for at, line in self._lines if at > self._heard - n}
            self.closed = self.closed or len(lines) >= FEWEST_LINES
        return self.closed

    @property
    def _may_repeat(self) -> bool:
        return bool(self._fence) or self._line.startswith(("|", "    ", "\t", *FENCES))

    def _end_line(self) -> None:
        line = self._line.strip()
        self._lines.append((self._heard, line))
        if self._fence:
            if line.startswith(self._fence):
                self._fence = ""
        elif line.startswith(FENCES):
            self._fence = line[:3]
        self._line = ""


def _period(ids: array[int], longest: int) -> int:
    """Tokens of the shortest period, of at most `longest`, that all of them repeat; 0: there is none."""
    data, size = ids.tobytes(), ids.itemsize
    return next((n for n in range(1, longest + 1) if data[n * size :] == data[: -n * size]), 0)
