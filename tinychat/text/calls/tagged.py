"""Calls whose arguments stand in tags, one a parameter: Qwen3-Coder, Qwen3.5, GLM, MiniMax, DeepSeek V3.2."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.text.calls.json_text import DamagedError, JsonText, escaped
from tinychat.text.calls.python_values import read_value
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, as_json

LONGEST_VALUE = 1 << 22  # characters of a value that is no text
_KINDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
_KINDS |= {"list": "array", "none": "null"}


@dataclass(frozen=True)
class Tagged:
    """`call` NAME `name_end` (`key` KEY `key_end` VALUE `value_end`)… `call_end`, in a `section` or not.

    name_ends  ends of the name; what begins the first parameter or ends the call stays
    head_end   the end of the tag that the name stands in, where more stands in it
    key_ends   ends of the key; `tag_end` that of the tag it stands in, whose rest may say `typed` of a text
    lines      a line break on each side of a value belongs to the tags
    wrapped    what may stand around a text
    """

    call: str
    name_ends: tuple[str, ...]
    key: str
    key_ends: tuple[str, ...]
    value_end: str
    call_end: str
    section: tuple[str, str] = ("", "")
    head_end: str = ""
    tag_end: str = ""
    between: str = ""  # between key and value, after white space
    typed: str = ""
    lines: bool = False
    wrapped: tuple[str, str] = ("", "")
    bare: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        return (self.section[0], self.call) if self.section[0] else (self.call,)

    @property
    def marks(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        parts = (*self.section, self.call, self.call_end, self.key, self.value_end, self.between)
        return (*parts, *self.name_ends, *self.key_ends, self.head_end, self.tag_end)

    def read(self, source: Source, found: Found) -> Waiting:
        """As a `Syntax` does it."""
        opened = yield from source.expect(*self.opens, after_space=False)
        sectioned = opened != self.call
        if sectioned:
            yield from source.expect(self.call)
        while True:
            yield from self._call(source, found)
            found.end()
            if not (sectioned and (yield from source.one_of((self.call,), after_space=True))):
                break
        if self.section[1]:  # also where the marker before was forgotten
            yield from source.close(self.section[1])

    def _call(self, source: Source, found: Found) -> Waiting:
        stays = {self.key, self.call_end}
        name = yield from source.until(*self.name_ends, *stays, keep=True)
        end = yield from source.one_of((*self.name_ends, *stays))
        if end in stays:
            source.back(len(end))
        elif self.head_end and end != self.head_end:
            yield from source.until(self.head_end)
        found.begin(name)
        types, keys = found.parameters(), set[str]()
        while True:
            if (yield from source.expect(self.key, self.call_end)) == self.call_end:
                break
            yield from self._parameter(source, found, types, keys)
        found.say("}" if keys else "{}")

    def _parameter(self, source: Source, found: Found, types: Mapping[str, Any], keys: set[str]) -> Waiting:
        key = (yield from source.until(*self.key_ends)).strip()
        if not key or key in keys:
            raise DamagedError
        told = (yield from source.until(self.tag_end)) if self.tag_end else ""
        if self.between:
            yield from source.expect(self.between)
        found.say(f"{', ' if keys else '{'}{as_json(key)}: ")
        keys.add(key)
        if self.typed and self.typed in told:
            kinds: set[str] | None = {"string"}
        else:
            kinds = kinds_of(types.get(key))
            if self.typed and told and kinds == {"string"}:
                kinds = None
        if kinds == {"string"} and not self.wrapped[0]:
            found.say('"')
            yield from self._text(source, lambda text: found.say(escaped(text)))
            found.say('"')
        else:
            parts: list[str] = []
            yield from self._text(source, parts.append, LONGEST_VALUE)
            text, (start, end) = "".join(parts), self.wrapped
            if start and text.startswith(start) and text.endswith(end):
                found.say(as_json(text[len(start) : -len(end)]))
            else:
                found.say(value_of(text, kinds))

    def _text(self, source: Source, said, most: int | None = None) -> Waiting:
        """The text of a value, up to an end that is followed by the next key or by the end of the call: what
        a value quotes does not end it.
        """
        first, line = True, False
        while True:
            text, whole = yield from self._until_end(source)
            if most is not None and (most := most - len(text)) < 0:
                raise DamagedError
            if self.lines and text:
                if first and text.startswith("\n"):
                    text = text[1:]
                first = False
                if line:
                    text, line = "\n" + text, False
                if text.endswith("\n"):  # it may be the last
                    text, line = text[:-1], True
            if text:
                said(text)
            if whole:
                return

    def _until_end(self, source: Source) -> Generator[None, None, tuple[str, bool]]:
        """Some of a value, and whether it ends there; its end is taken."""
        while True:
            at = source.text.find(self.value_end)
            if at > 0:
                return source.take(at), False
            if at < 0:
                n = len(source.text)
                longest = min(n, len(self.value_end) - 1)
                held = next(
                    (k for k in range(longest, 0, -1) if self.value_end.startswith(source.text[n - k :])), 0
                )
                if n > held:
                    return source.take(n - held), False
            else:
                rest = source.text[len(self.value_end) :].lstrip()
                follows = (self.key, self.call_end)
                if any(rest.startswith(f) for f in follows):
                    source.take(len(self.value_end))
                    return "", True
                if source.ended or not any(f.startswith(rest) for f in follows):
                    return source.take(len(self.value_end)), False
            yield from source.more()

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """As a `Syntax` does it."""
        edge = "\n" if self.lines else ""
        out = []
        for name, arguments in calls:
            parts = []
            for key, value in arguments.items():
                text = value if isinstance(value, str) else as_json(value)
                told = f" {self.typed}" if self.typed and isinstance(value, str) else ""
                end = self.key_ends[0] + told + self.tag_end + self.between
                parts.append(f"{self.key}{key}{end}{edge}{text}{edge}{self.value_end}\n")
            head = f"{self.call}{name}{self.name_ends[0]}{self.head_end}\n"
            out.append(head + "".join(parts) + self.call_end)
        return "\n".join(filter(None, (self.section[0], *out, self.section[1])))


def kinds_of(schema: Any, depth: int = 0) -> set[str] | None:
    """The JSON types that a schema allows; None: it does not say."""
    if not isinstance(schema, Mapping) or depth > 8:
        return None
    named = schema.get("type")
    if isinstance(named, str):
        named = [named]
    if isinstance(named, Sequence) and all(isinstance(t, str) for t in named):
        kinds = {_KINDS.get(t.lower(), t.lower()) for t in named}
        return {*kinds, "null"} if schema.get("nullable") is True else kinds
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), Sequence):
            each = [kinds_of(s, depth + 1) for s in schema[name]]
            return None if None in each else set().union(*(k for k in each if k))
    given = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
    if isinstance(given, list):
        return {_kind(v) for v in given}
    return None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return _KINDS.get("none" if value is None else type(value).__name__, "string")


def value_of(text: str, kinds: set[str] | None) -> str:
    """JSON of a value that was written without quotes: what a schema allows that it spells, else a text."""
    stripped = text.strip()
    found = _json(stripped)
    if found is not None:
        kind = _kind(found[0])
        if kinds is None or kind in kinds or (kind == "integer" and "number" in kinds):
            if kind != "string" or kinds is None:
                return found[1]
        elif kind == "number" and "integer" in kinds and found[0].is_integer():
            return str(int(found[0]))
    return as_json(text)


def _json(text: str) -> tuple[Any, str] | None:
    """A value, and its JSON, of JSON or of what Python writes for it; None for anything else."""
    value = JsonText()
    out, n = value.push(text)
    try:
        if not value.damaged and not value.done:
            out += value.end()
        if value.done and n == len(text):
            return json.loads(out), out
        read = read_value(text)
        return read, as_json(read)
    except (DamagedError, ValueError):
        return None
