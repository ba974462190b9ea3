"""Text that arrives in pieces, for readers that are generators: they yield where they need more of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

from tinychat.text.calls.json_text import DamagedError, JsonText, escaped

Waiting = Generator[None, None, None]
LONGEST_HEAD = 512  # characters of a name, a key or a header


class Source:
    """What has arrived and was not taken yet is `text`. What was taken is in `passed` where it belongs to
    whole calls, and in `raw` behind that.
    """

    def __init__(self, text: str = ""):
        self.text = text
        self.ended = False
        self.passed: list[str] = []
        self.raw: list[str] = []

    def take(self, n: int) -> str:
        """The next n characters, which are here."""
        taken, self.text = self.text[:n], self.text[n:]
        self.raw.append(taken)
        return taken

    def back(self, n: int) -> None:
        """Put the last n characters back: they were taken together with those before them, or alone."""
        taken = self.raw.pop()
        self.raw.append(taken[: len(taken) - n])
        self.text = taken[len(taken) - n :] + self.text

    def sure(self) -> None:
        """What was taken belongs to whole calls."""
        self.passed += self.raw
        self.raw = []

    def more(self) -> Waiting:
        """Wait for more text. Raises DamagedError when there is none."""
        if self.ended:
            raise DamagedError
        yield

    def one_of(self, options: Sequence[str], after_space: bool = False) -> Generator[None, None, str]:
        """Take one of these texts if it is next, the longest; "" if none is. after_space: white space may go
        before it, and is taken with it.
        """
        while True:
            text = self.text.lstrip() if after_space else self.text
            if not self.ended and any(len(text) < len(o) and o.startswith(text) for o in options):
                yield
                continue
            found = max((o for o in options if text.startswith(o)), key=len, default="")
            if found:
                self.take(len(self.text) - len(text) + len(found))
            return found

    def close(self, *options: str) -> Generator[None, None, str]:
        """Take one of these texts if it is next, behind white space, and at the end of all what is left of
        one that was cut.
        """
        found = yield from self.one_of(options, after_space=True)
        left = self.text.lstrip()
        if not found and self.ended and left and any(o.startswith(left) for o in options):
            self.take(len(self.text))
        return found

    def expect(self, *options: str, after_space: bool = True) -> Generator[None, None, str]:
        """Take one of these texts. Raises DamagedError for anything else."""
        found = yield from self.one_of(options, after_space)
        if not found:
            raise DamagedError
        return found

    def next(self) -> Generator[None, None, str]:
        """The next character that is no white space, which is taken; it stays."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip()))
            if self.text:
                return self.text[0]
            yield from self.more()

    def until(self, *ends: str, most: int = LONGEST_HEAD, keep: bool = False) -> Generator[None, None, str]:
        """Take text up to the first of these ends, and the end too unless `keep`. Raises DamagedError where
        it does not come within `most` characters.
        """
        while True:
            found = [(at, -len(end)) for end in ends if (at := self.text.find(end)) >= 0]
            begun = min(_begun(self.text, end) for end in ends)
            at, length = min(found, default=(begun, 0))
            if at > most:
                raise DamagedError
            if found and (self.ended or begun >= at):  # an end that begins earlier may still be arriving
                text = self.take(at)
                if not keep:
                    self.take(-length)
                return text
            yield from self.more()

    def word(self, pattern: re.Pattern[str], most: int = LONGEST_HEAD) -> Generator[None, None, str]:
        """Take what the pattern matches, of which each beginning matches too, and something follows."""
        while True:
            match = pattern.match(self.text)
            if self.text and (match is None or match.end() > most):
                raise DamagedError
            if match and match.end() < len(self.text):
                return self.take(match.end())
            yield from self.more()

    def json(self, said: Callable[[str], None]) -> Waiting:
        """Take a JSON value; its text is said as it comes."""
        value = JsonText()
        while not value.done:
            text, n = value.push(self.text)
            self.take(n)
            if text:
                said(text)
            if value.damaged:
                raise DamagedError
            if self.ended and not value.done:
                said(value.end())
            elif not value.done:
                yield

    def json_string(self, most: int = LONGEST_HEAD) -> Generator[None, None, str]:
        """Take a JSON string, and what it says."""
        if (yield from self.next()) != '"':
            raise DamagedError
        parts: list[str] = []
        value = JsonText()
        while not value.done:
            text, n = value.push(self.text[:most])
            self.take(n)
            parts.append(text)
            most -= n
            if value.damaged or (not value.done and most == 0):
                raise DamagedError
            if not value.done:
                yield from self.more()
        return JsonText.string("".join(parts))

    def string(self, end: str, said: Callable[[str], None]) -> Waiting:
        """Take a bare string up to `end`, and that; it is said as the inside of a JSON string as it comes."""
        while True:
            at = self.text.find(end)
            stop = at if at >= 0 else _begun(self.text, end)
            if stop:
                said(escaped(self.take(stop)))
            if at >= 0:
                self.take(len(end))
                return
            yield from self.more()


def _begun(text: str, end: str) -> int:
    """Index at which an unfinished `end` at the end of a text begins; its length if there is none."""
    n = len(text)
    for at in range(max(0, n - len(end) + 1), n):
        if end.startswith(text[at:]):
            return at
    return n
