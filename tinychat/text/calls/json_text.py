"""JSON as it arrives: where a value ends, and its text as any reader of JSON takes it."""

from __future__ import annotations

import json
import re

DEEPEST = 64  # lists and objects in each other
LONGEST_WORD = 64  # characters of a number
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_WORDS = {"true": "true", "false": "false", "null": "null"}
_WORDS |= {"True": "true", "False": "false", "None": "null"}  # as models write them that think in Python
_ESCAPES = frozenset('"\\/bfnrt')
_SPACE = " \t\r\n"


class DamagedError(Exception):
    """What is being read is no call, or only a part of one."""


def escaped(text: str) -> str:
    """A text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class JsonText:
    """One JSON value. `damaged` is what is none, what has a key twice in an object (readers differ in which
    they take), and what is too deep to be read.

    Characters that a string may not have, but that models write (line breaks), are escaped.
    """

    def __init__(self):
        self.done = self.damaged = False
        self._open: list[set[str] | None] = []  # keys of the objects that are open; None for a list
        self._want = "value"
        self._string: list[str] | None = None  # what has come of a string; joined up where it is a key
        self._escape = ""  # what has come of an escape
        self._word = ""

    def push(self, text: str) -> tuple[str, int]:
        """The value's text in what arrives, and how many characters of it were taken: all, until it ends, or
        up to the damage, however it was cut.
        """
        out: list[str] = []
        at = 0
        try:
            while at < len(text) and not self.done:
                at = self._step(text, at, out)
        except DamagedError:
            self.damaged = True
        return "".join(out), at

    def _step(self, text: str, at: int, out: list[str]) -> int:
        if self._string is not None:
            return self._inside(text, at, out)
        if match := _WORD.match(text, at):
            if not self._word and self._want not in ("value", "first"):
                raise DamagedError
            taken = match[0][: LONGEST_WORD - len(self._word)]
            if not taken:
                raise DamagedError
            self._word += taken
            return at + len(taken)
        if self._word:
            out.append(self._end_word())
            return at
        if text[at] not in _SPACE:
            self._mark(text[at])
        out.append(text[at])
        return at + 1

    def end(self) -> str:
        """No more comes: the end of a number. Raises DamagedError where the value is not whole."""
        text = self._end_word() if self._word else ""
        if not self.done:
            raise DamagedError
        return text

    @staticmethod
    def string(text: str) -> str:
        """What a JSON string says, with its quotes."""
        try:
            value = json.loads(text)
            value.encode()
        except (ValueError, AttributeError):  # half of a surrogate pair among them
            raise DamagedError from None
        return value

    def _inside(self, text: str, at: int, out: list[str]) -> int:
        assert self._string is not None
        if self._escape:
            self._escape += text[at]
            if self._escape[1] != "u":
                if self._escape[1] not in _ESCAPES:
                    raise DamagedError
            elif text[at] != "u" and text[at] not in "0123456789abcdefABCDEF":
                raise DamagedError
            elif len(self._escape) < 6:
                return at + 1
            self._say(self._escape, out)
            self._escape = ""
            return at + 1
        if match := _PLAIN.match(text, at):
            self._say(match[0], out)
            return match.end()
        c = text[at]
        if c == "\\":
            self._escape = c
        elif c == '"':
            said, self._string = "".join(self._string), None
            out.append(c)
            self._after_string(said)
        elif "\ud800" <= c <= "\udfff":
            self._say("\ufffd", out)
        else:
            self._say(escaped(c), out)
        return at + 1

    def _say(self, text: str, out: list[str]) -> None:
        assert self._string is not None
        out.append(text)
        if self._want == "key":
            self._string.append(text)

    def _after_string(self, said: str) -> None:
        if self._want != "key":
            self._after_value()
            return
        keys = self._open[-1]
        assert keys is not None
        key = json.loads(f'"{said}"')
        if key in keys:
            raise DamagedError
        keys.add(key)
        self._want = "colon"

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        if word not in _WORDS and not _NUMBER.fullmatch(word):
            raise DamagedError
        self._after_value()
        return _WORDS.get(word, word)

    def _after_value(self) -> None:
        self._want = "comma"
        self.done = not self._open

    def _mark(self, c: str) -> None:
        want, self._want = self._want, "value"
        value = want in ("value", "first")
        if c == '"' and (value or want in ("key", "first key")):
            self._want = "value" if value else "key"
            self._string = []
        elif c in "{[" and value and len(self._open) < DEEPEST:
            self._open.append(set() if c == "{" else None)
            self._want = "first key" if c == "{" else "first"
        elif c in "]}" and self._closes(c, want):
            self._open.pop()
            self._after_value()
        elif c == ":" and want == "colon":
            pass
        elif c == "," and want == "comma" and self._open:
            self._want = "value" if self._open[-1] is None else "key"
        else:
            raise DamagedError

    def _closes(self, c: str, want: str) -> bool:
        if not self._open:
            return False
        listed = self._open[-1] is None
        return c == ("]" if listed else "}") and want in ("comma", "first" if listed else "first key")
