"""Protocol between those who show a conversation and those who answer: requests, events, and their form
as lines of JSON.

A newer side may say more. Fields and events that are not known here are ignored; a request that is not known
is refused in words (`Failed`). Whatever else is wrong with a line is an error of the side that wrote it.
Loads nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from tinychat.base import shapes
from tinychat.base.events import Notice, Reading
from tinychat.conversation import Message

LINE_LIMIT = 1 << 26  # bytes that one of them may take

# Requests


@dataclass(frozen=True)
class Load:
    """A model in place of the present one. `options`: those of LoadOptions, and `keep_kv`: whether KV
    caches are kept on disk. → Loading…, then Loaded or Failed.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Answer the message at the end of `path` (the user's, or the last result of a call), or go on with the
    answer there. → Reading…, Began, Text… (of what is new) and Calling…, then Finished (the whole) or Failed.

    tools: that the model may call, in OpenAI's form. Calls come in the Finished message, and nobody here runs
    them: who asked adds their results to the path and asks again.
    chat: what the conversation is known by, from answer to answer. A chat whose key is a number has its KV
    cache kept under it, so that it goes on at once when it is resumed.
    """

    chat: str
    path: list[Message]
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Cancel:
    """Stop the running answer, felt between two steps or prefill chunks; its Finished says "cancelled"."""


@dataclass(frozen=True)
class EndThought:
    """Close the thought of the running answer, if there is one, and begin the answer proper."""


@dataclass(frozen=True)
class Count:
    """→ Reply: tokens of a text; None while no model is loaded. Questions are answered beside an answer."""

    id: int
    text: str


@dataclass(frozen=True)
class Head:
    """→ Reply: the beginning of a text that has at most that many tokens; None while no model is loaded."""

    id: int
    text: str
    tokens: int


@dataclass(frozen=True)
class Models:
    """→ Reply: what `tinychat.process.core.list_models` tells."""

    id: int


@dataclass(frozen=True)
class Limits:
    """→ Reply: weight_bytes_per_token and read_bandwidth_gb_s; None while they cannot be measured."""

    id: int


Request = Load | Answer | Cancel | EndThought | Count | Head | Models | Limits

# Events; `Reading` and `Notice` are those of a session


@dataclass(frozen=True)
class Loading:
    """Progress on the way to a model. `total` is 0 when unknown; while downloading, `done` and `total` are
    bytes.
    """

    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Loaded:
    """Ready to answer. `facts`: what `Model.describe` says; `sampling`: the model's own defaults; `asked`:
    the name that was asked for; the model's own may be another (`facts["model"]`). `takes_tools`: whether
    answers may be given some.
    """

    facts: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    has_template: bool = True
    asked: str = ""
    takes_tools: bool = True


@dataclass(frozen=True)
class Began:
    """The prompt is read and the first token is here. `prompt_text`: the end of what the template wrote;
    `prompt_tokens`: of the whole conversation so far.
    """

    prompt_text: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Text:
    """More of what the model writes, with reasoning and its markers (`tinychat.text.reasoning` splits it).
    `tokens` so far in all; `thought`: how many of them came before the answer, where there is reasoning.
    """

    text: str
    tokens: int
    thought: int | None = None


@dataclass(frozen=True)
class Calling:
    """The model is writing a call of this tool. `index`: 0 for the first of the answer; it may turn out to be
    none.
    """

    index: int
    name: str


@dataclass(frozen=True)
class Finished:
    """The answer as the session keeps it; why it ended and its numbers are among its fields."""

    message: Message


@dataclass(frozen=True)
class Failed:
    """Error of two lines, what is wrong and what to do; `during` is "load" or "answer"."""

    what: str
    todo: str
    during: str


@dataclass(frozen=True)
class Reply:
    """Answer to a question; None where it cannot be known."""

    id: int
    value: Any = None


@dataclass(frozen=True)
class Died:
    """The engine is gone and nobody asked it to go; `reason` is one line. Its client says so."""

    reason: str


EngineEvent = Loading | Loaded | Reading | Began | Text | Calling | Notice | Finished | Failed | Died

# As lines

REQUESTS: dict[str, type] = {
    "load": Load,
    "answer": Answer,
    "cancel": Cancel,
    "end_thought": EndThought,
    "count": Count,
    "head": Head,
    "models": Models,
    "limits": Limits,
}
EVENTS: dict[str, type] = {
    "loading": Loading,
    "loaded": Loaded,
    "reading": Reading,
    "began": Began,
    "text": Text,
    "calling": Calling,
    "notice": Notice,
    "done": Finished,
    "failed": Failed,
    "reply": Reply,
}
_NAMES = {cls: name for name, cls in (*REQUESTS.items(), *EVENTS.items())}


def to_json(said: Request | EngineEvent | Reply) -> bytes:
    """A request or an event as a line, with its end."""
    values = {f.name: getattr(said, f.name) for f in fields(said)}
    return json.dumps({"kind": _NAMES[type(said)], **values}, default=Message.as_dict).encode() + b"\n"


def from_json(line: bytes, kinds: dict[str, type]) -> Any:
    """The request (kinds: REQUESTS) or event (EVENTS) of a line; None for a kind that is not known.

    Raises ValueError for whatever is neither.
    """
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict) or not isinstance(kind := values.pop("kind", None), str):
        raise ValueError("it says nothing")
    if (cls := kinds.get(kind)) is None:
        return None
    try:
        return shapes.read(cls, values, strangers=True)
    except ValueError as e:
        raise ValueError(f"{kind}: {e}") from None


# Who answers


class ChatEngine(Protocol):
    """An engine as the chat screen uses it: a process (`client.EngineClient`), or this one
    (`local.LocalEngine`). It has one model, and gives one answer at a time.

    Events go to `on_event` in the order in which they happen, on the loop that called `start`. Requests never
    wait: what becomes of them is told by events. Questions wait for the engine, and give None where it is
    gone or does not know.
    """

    on_event: Callable[[EngineEvent], None]

    @property
    def pid(self) -> int | None:
        """The process that answers, while there is one."""

    async def start(self) -> None:
        """Begin, in place of what was there before. Raises TinychatError if the system cannot."""

    def load(self, model: str, options: dict[str, Any]) -> None:
        """Send `Load`."""

    def answer(
        self,
        chat: str,
        path: Sequence[Message],
        system: str | None,
        params: dict[str, Any],
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Send `Answer`."""

    def cancel(self) -> None:
        """Send `Cancel`."""

    def end_thought(self) -> None:
        """Send `EndThought`."""

    async def count(self, text: str) -> int | None:
        """Ask `Count`."""

    async def head(self, text: str, tokens: int) -> str | None:
        """Ask `Head`."""

    async def models(self) -> dict[str, Any] | None:
        """Ask `Models`."""

    async def limits(self) -> dict[str, float] | None:
        """Ask `Limits`."""

    async def close(self) -> None:
        """End: politely, then not. Idempotent."""
