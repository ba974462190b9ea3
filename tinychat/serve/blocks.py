"""An answer's events as the blocks that Anthropic's and OpenAI's newer APIs are made of: reasoning, text,
calls of tools, one after the other; and what both APIs ask for, as options of `Model.request`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tinychat.base import arguments
from tinychat.base.errors import UsageError
from tinychat.base.events import Completion, Event, TextDelta, ToolCallDelta
from tinychat.serve.problems import wrong

if TYPE_CHECKING:
    from tinychat.chat_request import ChatRequest
    from tinychat.model import Model

Kind = Literal["reasoning", "text", "call"]


@dataclasses.dataclass
class Block:
    """One block. `text`: so far, of a call its arguments; id and name: of a call."""

    kind: Kind
    index: int
    id: str = ""
    name: str = ""
    text: str = ""


class Step(NamedTuple):
    """A block begins, gets more text, or ends."""

    what: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """Feed it an answer's events; it tells what they do to the blocks, of which one is open at a time."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._call = -1  # the number of the call that is open

    def hear(self, event: Event) -> Iterator[Step]:
        """What an event does."""
        if isinstance(event, ToolCallDelta):
            if event.name or event.index != self._call or self._open is None or self._open.kind != "call":
                self._call = event.index
                yield from self._begin("call", event.id, event.name)
            yield from self._more(event.arguments)
            if event.damaged:  # it is none; what was written of it comes as text
                yield from self.end()
        elif isinstance(event, TextDelta):
            pieces: tuple[tuple[Kind, str], ...] = (("reasoning", event.reasoning), ("text", event.text))
            for kind, text in pieces:
                if text and (self._open is None or self._open.kind != kind):
                    yield from self._begin(kind)
                if text:
                    yield from self._more(text)

    def end(self) -> Iterator[Step]:
        """The answer has ended, or the block that is open."""
        if self._open is not None:
            block, self._open = self._open, None
            yield Step("end", block)

    def _begin(self, kind: Kind, id: str = "", name: str = "") -> Iterator[Step]:
        yield from self.end()
        self._open = Block(kind, len(self.all), id, name)
        self.all.append(self._open)
        yield Step("begin", self._open)

    def _more(self, text: str) -> Iterator[Step]:
        assert self._open is not None
        if text:
            self._open.text += text
            yield Step("more", self._open, text)


def blocks_of(completion: Completion) -> list[Block]:
    """The blocks of a whole answer."""
    found = []
    if completion.reasoning:
        found.append(Block("reasoning", 0, text=completion.reasoning))
    if completion.text:
        found.append(Block("text", len(found), text=completion.text))
    for call in completion.tool_calls:
        found.append(Block("call", len(found), call.id, call.name, call.arguments))
    return found


def message_of(blocks: list[Block]) -> dict[str, Any]:
    """Blocks of an answer as the message of a conversation that goes on with it."""

    def texts(kind: Kind) -> str:
        return "".join(b.text for b in blocks if b.kind == kind)

    message: dict[str, Any] = {"role": "assistant", "content": texts("text")}
    if reasoning := texts("reasoning"):
        message["reasoning_content"] = reasoning
    if calls := [b for b in blocks if b.kind == "call"]:
        message["tool_calls"] = [call_of(b.id, b.name, b.text) for b in calls]
    return message


def call_of(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool in a message of the assistant."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_of(name: Any, description: Any, parameters: Any, strict: Any = None) -> dict[str, Any]:
    """A tool as `Model.request` takes it."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def request_of(model: Model, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> ChatRequest:
    """The request for an answer. Agents say with each one how much shall be thought: what the model does not
    know of that is passed over. Raises UsageError.
    """
    problem: UsageError | None = None
    for left_out in ((), ("effort",), ("think",), ("effort", "think")):
        if all(wish in options for wish in left_out):
            try:
                return model.request(messages, **{k: v for k, v in options.items() if k not in left_out})
            except UsageError as e:
                problem = problem or e
    assert problem is not None  # the first attempt leaves nothing out
    raise problem


def check_begun(messages: list[dict[str, Any]]) -> None:
    """Raises ApiError where the last message is no answer that can go on."""
    try:
        arguments.begun(messages)
    except UsageError as e:
        raise wrong("messages", f"{e.what} {e.todo}") from e


def texts_of(value: Any, where: str, kinds: tuple[str, ...]) -> list[str]:
    """A text, or the texts of a list of parts of these kinds. Raises ApiError for whatever is neither."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong(where, f"{where} is neither a text nor a list of parts.")
    out = []
    for i, part in enumerate(value):
        at = f"{where}[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds:
            shown = kind[:40] if isinstance(kind, str) else "no kind"
            raise wrong(at, f"{at} is a part of {shown}: this model reads text alone.")
        text = part.get("text")
        if not isinstance(text, str):
            raise wrong(at, f"{at} has no text.")
        out.append(text)
    return out
