"""Calls that are a name, and behind it their arguments as JSON: Mistral, DeepSeek, Kimi, harmony."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.text.calls.json_text import DamagedError
from tinychat.text.calls.objects import BARE, Objects
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, as_json


@dataclass(frozen=True)
class Named:
    """`opens` HEAD `{…}` `closes`.

    head      what stands before the arguments; its group `name` is the tool's
    section   markers around all calls of an answer
    objects   also as objects with a name, behind the same marker (Mistral before 2025)
    ends      the end of a head, where it may go on without arguments that are an object (harmony)
    pattern   how a call is spelled, with {name} and {arguments}
    parts     other markers that a head may have
    """

    opens: tuple[str, ...]
    head: str
    closes: tuple[str, ...] = ()
    section: tuple[str, str] = ("", "")
    objects: bool = False
    ends: str = "{"
    pattern: str = ""
    parts: tuple[str, ...] = ()
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """As a `Syntax` has them."""
        return (*self.opens, *self.closes, *self.section, *self.parts, self.pattern)

    def read(self, source: Source, found: Found) -> Waiting:
        """As a `Syntax` does it."""
        opened = yield from source.expect(*self.opens, after_space=False)
        sectioned = opened == self.section[0]
        if sectioned:
            opened = yield from source.expect(*(o for o in self.opens if o != self.section[0]))
        while opened:
            if self.objects and (yield from source.next()) in BARE:
                yield from Objects(self.opens).behind(source, found)
            else:
                yield from self._call(source, found, opened)
            if not sectioned:
                break
            opened = yield from source.one_of(
                [o for o in self.opens if o != self.section[0]], after_space=True
            )
        if self.section[1]:
            yield from source.close(self.section[1])

    def _call(self, source: Source, found: Found, opened: str) -> Waiting:
        text = yield from source.until(self.ends, keep=self.ends == "{")
        head = re.fullmatch(self.head, opened + text + ("" if self.ends == "{" else self.ends))
        if head is None:
            raise DamagedError
        if (yield from source.next()) != "{":
            raise DamagedError
        found.begin(head["name"])
        yield from source.json(found.say)
        found.end()
        if self.closes:
            yield from source.close(*self.closes)

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """As a `Syntax` does it."""
        texts = (
            self.pattern.replace("{name}", name).replace("{arguments}", as_json(arguments))
            for name, arguments in calls
        )
        return "".join((self.section[0], *texts, self.section[1]))
