"""Calls that are JSON objects with a name and arguments: Hermes, Qwen, Llama 3, Mistral, Granite, Command."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.text.calls.json_text import DamagedError
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, as_json, whole_object

NAMES, ARGUMENTS = ("name", "tool_name", "function"), ("arguments", "parameters")
FIRST = (*NAMES, "type", "id")  # what a call without a marker begins with
BARE = ("{", "[")
LONGEST_HELD = 1 << 20  # characters of arguments that came before the name


@dataclass(frozen=True)
class Objects:
    """Objects behind a marker, one or several, in a list or not.

    closes      what may stand behind them
    keys        names of the fields, for those that write them in other words
    by_name     the object's only key is the tool's name (Apertus)
    bare        also without a marker, at the beginning of an answer
    """

    opens: tuple[str, ...]
    closes: tuple[str, ...] = ()
    listed: bool = False
    keys: tuple[str, str] = ("name", "arguments")
    by_name: bool = False
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        return (*self.opens, *self.closes)

    def read(self, source: Source, found: Found) -> Waiting:
        """As a `Syntax` does it."""
        if (yield from source.one_of((*self.opens, *BARE) if self.bare else self.opens)) in BARE:
            source.back(1)
        yield from self.behind(source, found)

    def behind(self, source: Source, found: Found, listed: bool | None = None) -> Waiting:
        """The objects behind the marker. listed: whether a bracket was read before; None: it may come."""
        if listed is None:
            listed = bool((yield from source.one_of(("[",), after_space=True)))
        while True:
            yield from self._object(source, found)
            found.end()
            separated = yield from source.one_of((",",) if listed else (",", ";", "{"), after_space=True)
            if not separated:
                break
            if separated == "{":
                source.back(1)
        if listed:
            yield from source.expect("]")
        if self.closes:
            yield from source.close(*self.closes)

    def _object(self, source: Source, found: Found) -> Waiting:
        yield from source.expect("{")
        held: list[str] = []
        named, keys = False, set[str]()
        argued = False
        while (yield from source.next()) != "}":
            if keys:
                yield from source.expect(",")
            key = yield from source.json_string()
            yield from source.expect(":")
            if key in keys or (self.by_name and keys) or (found.known_only and not keys and key not in FIRST):
                raise DamagedError
            keys.add(key)
            if self.by_name:
                found.begin(key)
                yield from self._arguments(source, found.say)
                named = argued = True
            elif key in NAMES and not named:
                found.begin((yield from source.json_string()))
                named = True
                for text in held:
                    found.say(text)
            elif key in ARGUMENTS and not argued:
                argued = True
                yield from self._arguments(source, found.say if named else held.append)
            else:
                yield from source.json(lambda text: None)
        source.take(1)
        if not named:
            raise DamagedError
        if not argued:
            found.say("{}")

    @staticmethod
    def _arguments(source: Source, said) -> Generator[None, None, None]:
        """The arguments: an object, a text that holds one, or null."""
        c = yield from source.next()
        if c == "{":
            yield from source.json(said)
        elif c == '"':
            said(whole_object((yield from source.json_string(LONGEST_HELD))))
        else:
            word: list[str] = []
            yield from source.json(word.append)
            if "".join(word) != "null":
                raise DamagedError
            said("{}")

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """As a `Syntax` does it."""
        name, arguments = self.keys
        texts = [as_json({n: a} if self.by_name else {name: n, arguments: a}) for n, a in calls]
        opening, closing = (self.opens or ("",))[0], (self.closes or ("",))[0]
        if self.listed:
            return f"{opening}[{', '.join(texts)}]{closing}"
        edge = "\n" if closing else ""
        return "\n".join(f"{opening}{edge}{text}{edge}{closing}" for text in texts)
