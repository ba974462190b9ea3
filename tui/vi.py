"""Vi's keys for the composer: an honest subset, with vi's meaning.

Moving: h j k l, w b e, 0 ^ $, gg G. Into insert mode: i a I A o O. Changing: x X, D C s, dd cc yy, and d c y
with any of the movements; p P, u. Counts before each. No visual mode, registers, searching, `.` or redo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MOVES = "hjklwbe0^$G"


@dataclass(frozen=True)
class Target:
    """Where a movement leads: an offset in the text. An operator takes the character there along where
    `inclusive`, and whole lines where `lines`.
    """

    at: int
    inclusive: bool = False
    lines: bool = False


@dataclass
class Edit:
    """A text, where its cursor is, and the mode that follows."""

    text: str
    at: int
    insert: bool = False


def line_start(text: str, at: int) -> int:
    """Where the line begins."""
    return text.rfind("\n", 0, at) + 1


def line_end(text: str, at: int) -> int:
    """Where the line ends: its newline, or the end of the text."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def last_place(text: str, at: int) -> int:
    """The last character of the line, on which the cursor may stand in normal mode."""
    return max(line_start(text, at), line_end(text, at) - 1)


def first_ink(text: str, at: int) -> int:
    """The first character of the line that is no blank."""
    start, end = line_start(text, at), line_end(text, at)
    ink = next((i for i in range(start, end) if text[i] not in " \t"), end)
    return ink if ink < end else last_place(text, at)


def _kind(char: str) -> int:
    if char.isspace():
        return 0
    return 2 if char.isalnum() or char == "_" else 1


def _word(text: str, at: int) -> int:
    kind = _kind(text[at]) if at < len(text) else 0
    while at < len(text) and kind and _kind(text[at]) == kind:
        at += 1
    while at < len(text) and _kind(text[at]) == 0:
        at += 1
        if text[at - 1] == "\n" and text[at : at + 1] == "\n":  # an empty line is a word
            break
    return at


def _back(text: str, at: int) -> int:
    at -= 1
    while at > 0 and _kind(text[at]) == 0 and not (text[at] == "\n" and text[at - 1] == "\n"):
        at -= 1
    while at > 0 and _kind(text[at]) and _kind(text[at - 1]) == _kind(text[at]):
        at -= 1
    return max(0, at)


def _end(text: str, at: int) -> int:
    at += 1
    while at < len(text) and _kind(text[at]) == 0:
        at += 1
    while at + 1 < len(text) and _kind(text[at + 1]) == _kind(text[at]):
        at += 1
    return min(at, max(0, len(text) - 1))


def _vertical(text: str, at: int, step: int) -> int | None:
    start = line_start(text, at)
    column = at - start
    if step < 0:
        if not start:
            return None
        goal = line_start(text, start - 1)
    else:
        goal = line_end(text, at) + 1
        if goal > len(text):
            return None
    return min(goal + column, last_place(text, goal))


def move(text: str, at: int, key: str, count: int | None) -> Target | None:
    """Where a movement leads; None where it leads nowhere."""
    n = count or 1
    if key == "h":
        return Target(max(line_start(text, at), at - n)) if at > line_start(text, at) else None
    if key == "l":
        return Target(min(line_end(text, at), at + n)) if at < line_end(text, at) else None
    if key in ("0", "^"):
        return Target(line_start(text, at) if key == "0" else first_ink(text, at))
    if key == "$":
        for _ in range(n - 1):
            at = min(len(text), line_end(text, at) + 1)
        return Target(last_place(text, at), inclusive=line_end(text, at) > line_start(text, at))
    if key in ("G", "gg"):
        lines = text.split("\n")
        row = min(count or (len(lines) if key == "G" else 1), len(lines)) - 1
        return Target(first_ink(text, sum(len(line) + 1 for line in lines[:row])), lines=True)
    if key == "b" and not at:
        return None
    steps: dict[str, Callable[[str, int], int | None]] = {
        "w": _word,
        "b": _back,
        "e": _end,
        "j": lambda text, at: _vertical(text, at, 1),
        "k": lambda text, at: _vertical(text, at, -1),
    }
    for i in range(n):
        there = steps[key](text, at)
        if there is None and i == 0:
            return None
        if there is None:  # as far as there are lines
            break
        at = there
    return Target(at, inclusive=key == "e", lines=key in "jk")


class Vi:
    """The mode, what of a command was typed, and what was deleted or copied last."""

    def __init__(self) -> None:
        self.insert = True
        self.taken = ""  # what p puts; whole lines end in a newline
        self._begun = ""

    @property
    def begun(self) -> str:
        """What of a command was typed."""
        return self._begun

    def forget(self) -> None:
        """Drop what of a command was typed."""
        self._begun = ""

    def press(self, key: str, text: str, at: int) -> Edit | str | None:
        """A key in normal mode: the text as it is then, or "undo", "up" and "down" (behind the ends of the
        text), or None: nothing yet, or nothing at all.
        """
        self._begun += key
        count, operator, motion_count, command = _parsed(self._begun)
        if not command:
            return None
        if command == "g" or (operator and command in "0123456789" and command != "0"):
            return None
        self._begun = ""
        n = None if count is None and motion_count is None else (count or 1) * (motion_count or 1)
        if operator:
            return self._operate(operator, command, n, text, at)
        if command in MOVES or command == "gg":
            target = move(text, at, command, n)
            if target is None:
                return {"j": "down", "k": "up"}.get(command)
            return Edit(text, min(target.at, last_place(text, target.at)))
        return self._command(command, n or 1, text, at)

    def _operate(self, operator: str, command: str, n: int | None, text: str, at: int) -> Edit | None:
        if command == operator:  # dd, cc, yy
            last = at
            for _ in range((n or 1) - 1):
                last = line_end(text, last) + 1
                if last > len(text):
                    return None
            return self._lines(operator, text, at, last, at)
        if command not in MOVES and command != "gg":
            return None
        if operator == "c" and command == "w" and at < len(text) and not text[at].isspace():
            target: Target | None = Target(at - 1)  # cw leaves the blanks behind the word
            for _ in range(n or 1):
                assert target is not None
                target = Target(_word_end(text, target.at + 1), inclusive=True)
        else:
            target = move(text, at, command, n)
        if target is None:
            return None
        if target.lines:
            return self._lines(operator, text, min(at, target.at), max(at, target.at), at)
        start, end = sorted((at, target.at))
        end += target.inclusive
        if command == "w":
            end = _not_into_the_next_line(text, start, end)
        return self._take(operator, text, start, end)

    def _take(self, operator: str, text: str, start: int, end: int) -> Edit:
        self.taken = text[start:end]
        if operator == "y":
            return Edit(text, start)
        left = text[:start] + text[end:]
        insert = operator == "c"
        return Edit(left, start if insert else min(start, last_place(left, start)), insert)

    def _lines(self, operator: str, text: str, first: int, last: int, at: int) -> Edit:
        start, end = line_start(text, first), line_end(text, last)
        self.taken = text[start:end] + "\n"
        if operator == "y":
            return Edit(text, first if first < at else at)
        if operator == "c":
            return Edit(text[:start] + text[end:], start, True)
        left = text[:start] + text[end + 1 :] if end < len(text) else text[: max(0, start - 1)]
        return Edit(left, first_ink(left, min(start, len(left))))

    def _command(self, command: str, n: int, text: str, at: int) -> Edit | str | None:
        start, end = line_start(text, at), line_end(text, at)
        if command == "u":
            return "undo"
        if command in "iaIA":
            ink = end if text[start:end].isspace() else first_ink(text, at)
            there = {"i": at, "a": min(at + 1, end), "I": ink, "A": end}[command]
            return Edit(text, there, True)
        if command == "o":
            return Edit(text[:end] + "\n" + text[end:], end + 1, True)
        if command == "O":
            return Edit(text[:start] + "\n" + text[start:], start, True)
        if command in "xs" and at < end:
            return self._take("d" if command == "x" else "c", text, at, min(end, at + n))
        if command == "s":
            return Edit(text, at, True)
        if command == "X" and at > start:
            return self._take("d", text, max(start, at - n), at)
        if command in "DC":
            return self._take("d" if command == "D" else "c", text, at, end)
        if command in "pP" and self.taken:
            return self._put(command, n, text, at)
        return None

    def _put(self, command: str, n: int, text: str, at: int) -> Edit:
        if self.taken.endswith("\n"):
            lines = self.taken * n
            if command == "P":
                there = line_start(text, at)
                return Edit(text[:there] + lines + text[there:], first_ink(text[:there] + lines, there))
            there = line_end(text, at)
            out = text[:there] + "\n" + lines[:-1] + text[there:]
            return Edit(out, first_ink(out, there + 1))
        there = at if command == "P" or line_end(text, at) == at else at + 1
        put = self.taken * n
        cursor = there if "\n" in put else there + len(put) - 1
        return Edit(text[:there] + put + text[there:], cursor)


def _word_end(text: str, at: int) -> int:
    """The end of the word that `at` is in, or of the next one."""
    while at < len(text) and _kind(text[at]) == 0:
        at += 1
    while at + 1 < len(text) and _kind(text[at + 1]) == _kind(text[at]):
        at += 1
    return min(at, max(0, len(text) - 1))


def _not_into_the_next_line(text: str, start: int, end: int) -> int:
    """The end of a `dw` whose last word is the last one of its line: it stops there."""
    line = line_start(text, end)
    if start < line and not text[line:end].strip():
        return max(start, line - 1)
    return end


def _parsed(typed: str) -> tuple[int | None, str, int | None, str]:
    """Count, operator, second count and the command of what was typed."""
    count, rest = _number(typed)
    operator = ""
    if rest[:1] in ("d", "c", "y") and rest:
        operator, rest = rest[0], rest[1:]
    more, rest = _number(rest) if operator else (None, rest)
    return count, operator, more, rest


def _number(typed: str) -> tuple[int | None, str]:
    i = 0
    while i < len(typed) and typed[i].isdecimal() and typed[i].isascii() and not (i == 0 and typed[0] == "0"):
        i += 1
    return (min(int(typed[:i]), 1000) if i else None), typed[i:]
