"""Calls as Python writes them: LFM2, Llama 4 and 3.2, Olmo 3."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.text.calls.json_text import DamagedError
from tinychat.text.calls.objects import BARE, Objects
from tinychat.text.calls.python_values import LONGEST, read_value, written_value
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, as_json

_NAME = re.compile(r"[^\W\d][\w.-]*")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Pythonic:
    """`[f(a=1), g()]` behind a marker, or `f(a=1)` on lines of their own.

    listed    brackets stand around them
    objects   also as JSON objects, behind the same marker
    """

    opens: tuple[str, ...]
    closes: tuple[str, ...] = ()
    listed: bool = True
    objects: bool = False
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        return (*self.opens, *self.closes)

    def read(self, source: Source, found: Found) -> Waiting:
        """As a `Syntax` does it."""
        if (yield from source.one_of((*self.opens, *BARE) if self.bare else self.opens)) in BARE:
            source.back(1)
        listed = bool((yield from source.one_of(("[",), after_space=True)))
        if self.objects and (yield from source.next()) == "{":
            yield from Objects(self.opens, self.closes).behind(source, found, listed)
            return
        ends = ("]",) if listed else self.closes
        while True:
            yield from self._call(source, found)
            found.end()
            if ends and (yield from source.close(*ends)):
                break
            separated = yield from source.one_of((",", ";"), after_space=True)
            if not separated and (listed or not self.closes):
                break
        if listed and self.closes:
            yield from source.close(*self.closes)

    @staticmethod
    def _call(source: Source, found: Found) -> Waiting:
        yield from source.next()
        name = yield from source.word(_NAME)
        yield from source.expect("(")
        found.begin(name.removesuffix(".call"))
        keys: set[str] = set()
        while (yield from source.next()) != ")":
            if keys:
                yield from source.expect(",")
            key = (yield from source.until("=")).strip()
            if not key.isidentifier() or key in keys:
                raise DamagedError
            value = read_value((yield from _value(source)))
            found.say(f"{', ' if keys else '{'}{as_json(key)}: {as_json(value)}")
            keys.add(key)
        source.take(1)
        found.say("}" if keys else "{}")

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """As a `Syntax` does it."""
        texts = (f"{name}({', '.join(f'{k}={written_value(v)}' for k, v in a.items())})" for name, a in calls)
        opening, closing = (self.opens or ("",))[0], (self.closes or ("",))[0]
        if self.listed:
            return f"{opening}[{', '.join(texts)}]{closing}"
        return "\n".join((opening, *texts, closing)).strip("\n")


def _value(source: Source) -> Generator[None, None, str]:
    """Take text up to the comma or the bracket that ends a value; which stays."""
    at, closes, quote = 0, list[str](), ""
    while at <= LONGEST:
        c = source.text[at : at + 1]
        if not c or (not quote and c in "'\"" and len(source.text) < at + 3 and not source.ended):
            yield from source.more()
        elif c == "\\":
            if len(source.text) < at + 2:
                yield from source.more()
            else:
                at += 2
        elif quote:
            ended = source.text.startswith(quote, at)
            if len(source.text) < at + len(quote) and not source.ended and quote.startswith(source.text[at:]):
                yield from source.more()
                continue
            at += len(quote) if ended else 1
            quote = "" if ended else quote
        elif c in "'\"":
            quote = c * 3 if source.text.startswith(c * 3, at) else c
            at += len(quote)
        elif not closes and c in ",)":
            return source.take(at)
        else:
            if c in _PAIRS:
                closes.append(_PAIRS[c])
            elif c in ")]}" and (not closes or closes.pop() != c):
                break
            at += 1
    raise DamagedError
