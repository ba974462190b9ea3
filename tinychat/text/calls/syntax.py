"""What a syntax of calls is, and where its reader says what it finds."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tinychat.base.events import ToolCall, ToolCallDelta
from tinychat.text.calls.json_text import DamagedError, JsonText
from tinychat.text.calls.source import LONGEST_HEAD, Source, Waiting

_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9  # Mistral's templates take no other


def new_id() -> str:
    """An id that no other call has."""
    return "".join(secrets.choice(_LETTERS) for _ in range(ID_LENGTH))


class Found:
    """The calls that a reader finds, as they come: it begins one, says its arguments, and ends it.

    tools: parameters (JSON schema) of each tool by name. known_only: other names are no calls. most: of whole
    ones.
    """

    def __init__(
        self,
        source: Source,
        tools: Mapping[str, Any],
        known_only: bool = False,
        most: int | None = None,
    ):
        self.source, self.tools, self.known_only, self.most = source, tools, known_only, most
        self.deltas: list[ToolCallDelta] = []  # those that nobody has taken yet
        self.whole: list[ToolCall] = []
        self._index = -1
        self._id = self._name = ""
        self._arguments: list[str] | None = None  # of the call that is open

    @property
    def enough(self) -> bool:
        """Whether no further call may come."""
        return self.most is not None and len(self.whole) >= self.most

    def begin(self, name: str) -> None:
        """A call of this tool. Raises DamagedError for what is no name."""
        if self.enough:
            raise DamagedError
        name = name.strip()
        if not name or len(name) > LONGEST_HEAD or not name.isprintable():
            raise DamagedError
        if self.known_only and name not in self.tools:
            raise DamagedError
        self._index += 1
        self._id, self._name, self._arguments = new_id(), name, []
        self.deltas.append(ToolCallDelta(self._index, self._id, name))

    def say(self, arguments: str) -> None:
        """More of its arguments."""
        assert self._arguments is not None
        self._arguments.append(arguments)
        self.deltas.append(ToolCallDelta(self._index, arguments=arguments))

    def end(self) -> None:
        """The call is whole."""
        assert self._arguments is not None
        self.whole.append(ToolCall(self._id, self._name, "".join(self._arguments)))
        self._arguments = None
        self.source.sure()

    def damage(self) -> None:
        """What is open will not become whole."""
        if self._arguments is not None:
            self.deltas.append(ToolCallDelta(self._index, damaged=True))
            self._arguments = None

    def take(self) -> list[ToolCallDelta]:
        """What was found since the last time."""
        out: list[ToolCallDelta] = []
        for delta in self.deltas:
            if out and not delta.name and not delta.damaged and not out[-1].damaged:
                arguments = out[-1].arguments + delta.arguments
                out[-1] = replace(out[-1], arguments=arguments)
            else:
                out.append(delta)
        self.deltas = []
        return out

    def parameters(self) -> dict[str, Any]:
        """Schemas of the open call's parameters by name; none that are not known."""
        schema = self.tools.get(self._name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return dict(properties) if isinstance(properties, Mapping) else {}


class Syntax(Protocol):
    """How a family writes its calls."""

    @property
    def opens(self) -> tuple[str, ...]:
        """Texts at which a call may begin."""
        ...

    @property
    def bare(self) -> bool:
        """Whether a call without a marker counts where it begins the answer."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that mark something: control tokens among them are read as text."""
        ...

    def read(self, source: Source, found: Found) -> Waiting:
        """Read what one of `opens` begins. Raises DamagedError where it is no call; what was taken by then
        is text.
        """
        ...

    def spell(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Calls (names and arguments) as the model writes them, for templates that do not."""
        ...


def whole_object(text: str) -> str:
    """JSON text that somebody put into a string, which must be an object."""
    value = JsonText()
    out, n = value.push(text)
    if not value.done or value.damaged or text[n:].strip() or not out.lstrip().startswith("{"):
        raise DamagedError
    return out


def as_json(value: Any) -> str:
    """A value as JSON, as templates write it."""
    return json.dumps(value, ensure_ascii=False)
