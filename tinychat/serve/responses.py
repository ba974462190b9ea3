"""OpenAI's /v1/responses: what is asked, in our words, and the endpoints; `response_form` writes answers."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinychat.base.characters import whole
from tinychat.serve.blocks import call_of, request_of, texts_of, tool_of
from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, wrong
from tinychat.serve.replies import Reply
from tinychat.serve.response_form import Form
from tinychat.serve.service import endpoint, error_of, service_of
from tinychat.serve.streams import Stream, Whole, event

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.chat_request import ChatRequest
    from tinychat.model import Model

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
ELSEWHERE = ("background", "conversation", "prompt")  # what only OpenAI's own servers have
MOST_KEPT, MOST_CHARACTERS = 256, 1 << 25
GAP = "\n\n"


@dataclass
class Asked:
    """A request for a response, in our words. `echo`: fields that the response says again."""

    model: str | None
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    stream: bool
    store: bool
    instructions: str | None
    echo: dict[str, Any]

    @classmethod
    def of(cls, fields: Fields, kept: Kept) -> Asked:
        """Raises ApiError for what is wrong."""
        for name in ELSEWHERE:
            if name in fields and fields[name] is not False:
                raise ApiError(400, f"{name} is not supported.", param=name, code="unsupported_parameter")
        before: list[dict[str, Any]] = []
        if (previous := fields.text("previous_response_id")) is not None:
            before = kept.messages(previous)
        messages = [*before, *_input(fields.need("input"))]
        instructions = fields.check("instructions", _text)
        options = {**_sampling(fields), **_tools(fields), **_form(fields)}
        if not messages:
            raise wrong("input", "input has no messages.")
        store = "store" not in fields or fields.flag("store")
        asked = cls(
            fields.text("model"),
            messages,
            options,
            fields.flag("stream"),
            store,
            instructions,
            {},
        )
        asked.echo = _echo(fields, asked)
        return asked

    def requests(self, model: Model) -> list[ChatRequest]:
        """The one request. Raises UsageError."""
        return [request_of(model, _merged(self.instructions, self.messages), self.options)]


class Kept:
    """Responses that a later request may go on from, in memory: the newest, within bounds."""

    def __init__(self, most: int = MOST_KEPT, characters: int = MOST_CHARACTERS):
        self._most, self._characters = most, characters
        self._kept: OrderedDict[str, tuple[list[dict[str, Any]], dict[str, Any], int]] = OrderedDict()
        self._size = 0

    def add(self, id: str, messages: list[dict[str, Any]], response: dict[str, Any]) -> None:
        """Keep a response and the conversation to its end; the oldest make room."""
        size = sum(_size(m) for m in messages) + len(json.dumps(response))
        if size > self._characters:
            return
        self._kept[id] = (messages, response, size)
        self._size += size
        while len(self._kept) > self._most or self._size > self._characters:
            self._size -= self._kept.popitem(last=False)[1][2]

    def messages(self, id: str) -> list[dict[str, Any]]:
        """The conversation to a response. Raises ApiError."""
        if id not in self._kept:
            raise ApiError(
                400,
                f"The response {id[:80]} is not kept here (any more): send the whole conversation.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(id)
        return self._kept[id][0]

    def response(self, id: str) -> dict[str, Any]:
        """A response as it was. Raises ApiError."""
        if id not in self._kept:
            raise ApiError(404, f"The response {id[:80]} is not kept here.", code="not_found")
        return self._kept[id][1]

    def drop(self, id: str) -> None:
        """Forget a response. Raises ApiError."""
        self.response(id)
        self._size -= self._kept.pop(id)[2]


def _size(m: dict[str, Any]) -> int:
    """Characters of a message, nearly."""
    calls = sum(len(c["function"]["arguments"]) + 100 for c in m.get("tool_calls", ()))
    return 100 + len(m["content"]) + len(m.get("reasoning_content", "")) + calls


# What is asked


def _text(name: str, value: Any) -> str:
    return GAP.join(texts_of(value, name, TEXTS))


def _sampling(fields: Fields) -> dict[str, Any]:
    given = {k: fields[k] for k in ("temperature", "top_p", "top_k", "min_p", "seed") if k in fields}
    options = Fields(given).sampling()
    if "max_output_tokens" in fields:
        options["max_tokens"] = fields.whole("max_output_tokens", 1, 1 << 31)
    return options


def _tools(fields: Fields) -> dict[str, Any]:
    """Tools that are functions; those that OpenAI's own servers run cannot be had here."""
    tools, choice = fields["tools"] or [], fields["tool_choice"]
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise wrong("tools", "tools is not a list of tools.")
    found = [
        tool_of(t.get("name"), t.get("description"), t.get("parameters"), t.get("strict"))
        for t in tools
        if t.get("type") == "function"
    ]
    if not found:
        return {}
    options: dict[str, Any] = {"tools": found}
    if isinstance(choice, Mapping):
        choice = choice.get("name") if choice.get("type") == "function" else None
        if not isinstance(choice, str):
            raise wrong("tool_choice", "tool_choice names no function.")
    if choice is not None:
        options["tool_choice"] = choice
    if "parallel_tool_calls" in fields:
        options["parallel_tool_calls"] = fields.flag("parallel_tool_calls")
    return options


def _form(fields: Fields) -> dict[str, Any]:
    """The form of the answer, and how much is thought before it."""
    options: dict[str, Any] = {}
    form, effort = fields.object("text").object("format"), fields.object("reasoning").text("effort")
    if effort is not None:
        options["effort"] = effort
    kind = form["type"]
    if kind == "json_object":
        options["response_format"] = {"type": kind}
    elif kind == "json_schema":
        schema = {k: form[k] for k in ("name", "schema", "strict") if k in form}
        options["response_format"] = {"type": kind, "json_schema": schema}
    elif kind not in (None, "text"):
        raise wrong("text", "text.format is of no known type.")
    return options


def _input(value: Any) -> list[dict[str, Any]]:
    """The messages of an input: a text, or items; those that an answer is made of are one message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong("input", "input is neither a text nor a list of items.")
    out: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        where = f"input[{i}]"
        if not isinstance(item, Mapping):
            raise wrong("input", f"{where} is not an item.")
        m = _message_of(item, where)
        if m is None:
            continue
        if m["role"] == "assistant" and out and out[-1]["role"] == "assistant":
            _join(out[-1], m)
        else:
            out.append(m)
    return out


def _message_of(item: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """An item as a message; None for one that tells a model of another server nothing."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong("input", f"{where} has no known role.")
        texts = texts_of(item.get("content"), f"{where}.content", TEXTS)
        return {"role": ROLES[role], "content": ("" if role == "assistant" else GAP).join(texts)}
    if kind == "function_call":
        id, name, given = item.get("call_id"), item.get("name"), item.get("arguments", "{}")
        if not isinstance(id, str) or not isinstance(name, str) or not isinstance(given, str):
            raise wrong("input", f"{where} needs a call_id, a name and arguments.")
        return {"role": "assistant", "content": "", "tool_calls": [call_of(id, name, given)]}
    if kind == "function_call_output":
        if not isinstance(id := item.get("call_id"), str):
            raise wrong("input", f"{where} needs the call_id of its call.")
        said = GAP.join(texts_of(item.get("output"), f"{where}.output", TEXTS))
        return {"role": "tool", "tool_call_id": id, "content": said}
    if kind == "reasoning":
        content = item.get("content") or item.get("summary") or []
        said = "".join(texts_of(content, f"{where}.content", TEXTS))
        return {"role": "assistant", "content": "", "reasoning_content": said} if said else None
    shown = kind[:40] if isinstance(kind, str) else "no kind"
    raise wrong("input", f"{where} is an item of {shown}, which is not supported.")


def _join(m: dict[str, Any], more: dict[str, Any]) -> None:
    """Add a piece of an answer to its message."""
    m["content"] += more["content"]
    if "reasoning_content" in more:
        m["reasoning_content"] = m.get("reasoning_content", "") + more["reasoning_content"]
    if "tool_calls" in more:
        m["tool_calls"] = [*m.get("tool_calls", ()), *more["tool_calls"]]


def _merged(instructions: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with one system message before it, as chat templates want it."""
    system = [] if instructions is None else [instructions]
    rest = list(messages)
    while rest and rest[0]["role"] == "system":
        system.append(rest.pop(0)["content"])
    return ([{"role": "system", "content": GAP.join(system)}] if system else []) + rest


def _echo(fields: Fields, asked: Asked) -> dict[str, Any]:
    said = {
        "instructions": asked.instructions,
        "max_output_tokens": fields["max_output_tokens"],
        "metadata": fields.object("metadata").body,
        "parallel_tool_calls": fields["parallel_tool_calls"] is not False,
        "previous_response_id": fields["previous_response_id"],
        "reasoning": {"effort": fields.object("reasoning")["effort"], "summary": None},
        "store": asked.store,
        "temperature": fields["temperature"],
        "text": {"format": fields.object("text")["format"] or {"type": "text"}},
        "tool_choice": fields["tool_choice"] or "auto",
        "tools": fields["tools"] or [],
        "top_p": fields["top_p"],
        "truncation": "disabled",
        "user": None,
    }
    return json.loads(whole(json.dumps(said, ensure_ascii=False)))  # halves of characters cannot be sent


# Endpoints


def kept_by(request: Request) -> Kept:
    """The responses that this server keeps."""
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = Kept()
    return state.responses


@endpoint()
async def responses(request: Request) -> Response:
    """One response."""
    service, kept = service_of(request), kept_by(request)
    asked = Asked.of(await service.bodies.fields(request), kept)
    answer, name = await service.ask(asked.model, asked.requests)

    def keep(response: dict[str, Any], message: dict[str, Any]) -> None:
        if asked.store:
            kept.add(response["id"], [*asked.messages, message], response)

    form = Form(name, asked.echo, keep)
    if not asked.stream:
        return Whole(form.whole(answer), error_of, answer.drop)

    def error_event(problem: ApiError) -> bytes:
        return event(form.failed(problem), "response.failed")

    return Stream(form.events(answer), error_of, error_event, answer.drop, service.limits.quiet_time)


@endpoint()
async def response(request: Request) -> Response:
    """A response that is kept; DELETE forgets it."""
    kept, id = kept_by(request), request.path_params["id"]
    if request.method == "DELETE":
        kept.drop(id)
        return Reply({"id": id, "object": "response", "deleted": True})
    return Reply(kept.response(id))
