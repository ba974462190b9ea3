"""Calls as Gemma writes them: `call:NAME{key:value,…}` with texts in quotes of their own."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.text.calls.json_text import DEEPEST, DamagedError
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, as_json
from tinychat.text.calls.tagged import value_of

_ENDS = (",", "}", "]")
_WORDS = {"integer", "number", "boolean", "null"}


@dataclass(frozen=True)
class Gemma:
    """`opens` `call:NAME{…}` `closes`; `quote` stands around texts."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    quote: str
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        return (*self.opens, *self.closes, self.quote)

    def read(self, source: Source, found: Found) -> Waiting:
        """As a `Syntax` does it."""
        yield from source.expect(*self.opens, after_space=False)
        yield from source.expect("call:")
        found.begin((yield from source.until("{", keep=True)))
        yield from self._value(source, found, 0)
        found.end()
        yield from source.close(*self.closes)

    def _value(self, source: Source, found: Found, depth: int) -> Waiting:
        if depth > DEEPEST:
            raise DamagedError
        c = yield from source.next()
        if (yield from source.one_of((self.quote,))):
            found.say('"')
            yield from source.string(self.quote, found.say)
            found.say('"')
        elif c == "{":
            yield from self._object(source, found, depth)
        elif c == "[":
            yield from self._list(source, found, depth)
        else:
            text = yield from source.until(*_ENDS, keep=True)
            value = value_of(text, _WORDS)
            if value.startswith('"'):
                raise DamagedError
            found.say(value)

    def _object(self, source: Source, found: Found, depth: int) -> Waiting:
        source.take(1)
        found.say("{")
        keys: set[str] = set()
        while (yield from source.next()) != "}":
            if keys:
                yield from source.expect(",")
                yield from source.next()
            key = yield from self._key(source)
            if key in keys:
                raise DamagedError
            found.say(f"{', ' if keys else ''}{as_json(key)}: ")
            keys.add(key)
            yield from self._value(source, found, depth + 1)
        source.take(1)
        found.say("}")

    def _list(self, source: Source, found: Found, depth: int) -> Waiting:
        source.take(1)
        found.say("[")
        first = True
        while (yield from source.next()) != "]":
            if not first:
                yield from source.expect(",")
                found.say(", ")
            first = False
            yield from self._value(source, found, depth + 1)
        source.take(1)
        found.say("]")

    def _key(self, source: Source) -> Generator[None, None, str]:
        if (yield from source.one_of((self.quote,))):
            key = yield from source.until(self.quote)
            yield from source.expect(":")
            return key
        key = (yield from source.until(":")).strip()
        if not key or any(c in key for c in "{}[],\n"):
            raise DamagedError
        return key

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """As a `Syntax` does it."""
        return "".join(
            f"{self.opens[0]}call:{name}{self._spelled(arguments)}{self.closes[0]}"
            for name, arguments in calls
        )

    def _spelled(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{self._spelled(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._spelled, value)) + "]"
        return as_json(value)
