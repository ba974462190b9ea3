"""Calls of tools as an OpenAI-compatible server streams them: pieces by index, or whole ones at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinychat.base.characters import whole
from tinychat.base.events import ToolCall, ToolCallDelta
from tinychat.text.calls.json_text import DamagedError
from tinychat.text.calls.syntax import new_id, whole_object

MOST = 128  # calls of one answer
LONGEST_NAME = 256


@dataclass
class _Call:
    """One call so far. given: the id that the server gave it."""

    given: str
    id: str
    name: str
    arguments: str = ""

    def made(self) -> ToolCall | None:
        """The call, if its arguments are an object."""
        try:
            return ToolCall(self.id, self.name, whole_object(self.arguments or "{}"))
        except DamagedError:
            return None


class ServedCalls:
    """Feed it the `tool_calls` of each chunk. Servers differ: arguments come piece by piece, in one piece, or
    as an object; ids come once, again with each piece, or as another one each time; some number every call 0.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._at: dict[int, int] = {}  # a server's index → ours

    def take(self, pieces: Any) -> Iterator[ToolCallDelta]:
        """The pieces in a chunk; what is none is left out."""
        for i, piece in enumerate(pieces if isinstance(pieces, list) else ()):
            function = piece.get("function") if isinstance(piece, dict) else None
            if not isinstance(function, dict):
                continue
            index = piece.get("index")
            yield from self._piece(index if type(index) is int else i, piece.get("id"), function)

    def _piece(self, index: int, id: Any, function: dict[str, Any]) -> Iterator[ToolCallDelta]:
        name, id = _text(function.get("name"))[:LONGEST_NAME], _text(id)[:LONGEST_NAME]
        given = function.get("arguments")
        arguments = json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given
        arguments = _text(arguments)
        known = self._calls[self._at[index]] if index in self._at else None
        another = known is not None and name and id and id != known.given and known.arguments
        if known is None or (another and known.made() is not None):
            if not name or len(self._calls) >= MOST:
                return
            mine = id if all(id != c.id for c in self._calls) else ""
            known = _Call(id, mine or new_id(), name, arguments)
            self._at[index] = len(self._calls)
            self._calls.append(known)
            yield ToolCallDelta(self._at[index], known.id, name, arguments)
        elif arguments:
            known.arguments += arguments
            yield ToolCallDelta(self._at[index], arguments=arguments)

    @property
    def size(self) -> int:
        """Characters of them all."""
        return sum(len(c.arguments) for c in self._calls)

    def __bool__(self) -> bool:
        return bool(self._calls)

    def end(self) -> tuple[list[ToolCall], list[tuple[int, str]]]:
        """The whole calls, and (index, what was said of it) of those that are none."""
        made = [c.made() for c in self._calls]
        lost = [(i, f"{c.name}{c.arguments}") for i, c in enumerate(self._calls) if made[i] is None]
        return [c for c in made if c is not None], lost


def _text(value: Any) -> str:
    return whole(value) if isinstance(value, str) else ""
