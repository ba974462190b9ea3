"""Anthropic's /v1/messages, and how many tokens one would take."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Completion, Done, FinishReason, Stats
from tinychat.serve.answers import Answer
from tinychat.serve.blocks import (
    Block,
    Blocks,
    Step,
    blocks_of,
    call_of,
    check_begun,
    request_of,
    texts_of,
    tool_of,
)
from tinychat.serve.chat import completions_of
from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, wrong
from tinychat.serve.replies import Reply
from tinychat.serve.service import endpoint, service_of
from tinychat.serve.streams import Stream, Whole, event

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.chat_request import ChatRequest
    from tinychat.model import Model

ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
REASONS: dict[FinishReason, str] = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "context_full": "model_context_window_exceeded",
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
GAP = "\n\n"  # between two texts of one message


@dataclass
class Asked:
    """A request for a message, in our words."""

    model: str | None
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    stream: bool

    @classmethod
    def of(cls, fields: Fields, counting: bool = False) -> Asked:
        """Raises ApiError for what is wrong."""
        options = _tools(fields) if counting else {**_sampling(fields), **_tools(fields), **_thought(fields)}
        messages = [*_system(fields), *_messages(fields.need("messages"))]
        if messages[-1]["role"] == "assistant":
            check_begun(messages)
            options["go_on"] = True
        return cls(fields.text("model"), messages, options, fields.flag("stream"))

    def requests(self, model: Model) -> list[ChatRequest]:
        """The one request. Raises UsageError."""
        return [request_of(model, self.messages, self.options)]


# What is asked


def _sampling(fields: Fields) -> dict[str, Any]:
    fields.need("max_tokens")
    options: dict[str, Any] = {"max_tokens": fields.whole("max_tokens", 1, 1 << 31)}
    given = Fields({k: fields[k] for k in ("temperature", "top_p", "top_k") if k in fields})
    options |= given.sampling()
    if "stop_sequences" in fields:
        stop = fields["stop_sequences"]
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise wrong("stop_sequences", "stop_sequences is not a list of texts.")
        options["stop"] = tuple(stop)
    return options


def _tools(fields: Fields) -> dict[str, Any]:
    """Tools that are functions; those that Anthropic's own servers run cannot be had here."""
    tools, choice = fields["tools"] or [], fields.object("tool_choice")
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise wrong("tools", "tools is not a list of tools.")
    options: dict[str, Any] = {}
    found = [
        tool_of(t.get("name"), t.get("description"), t.get("input_schema"), t.get("strict"))
        for t in tools
        if t.get("type") in (None, "custom")
    ]
    if not found:
        return options
    options["tools"] = found
    if (kind := choice["type"]) is not None:
        if kind != "tool" and not (isinstance(kind, str) and kind in CHOICES):
            raise wrong("tool_choice", "tool_choice is of no known type.")
        options["tool_choice"] = CHOICES[kind] if kind != "tool" else choice.need("name")
    if choice.flag("disable_parallel_tool_use"):
        options["parallel_tool_calls"] = False
    return options


def _thought(fields: Fields) -> dict[str, Any]:
    """How much is thought before the answer, and the form of the answer."""
    options: dict[str, Any] = {}
    thinking, output = fields.object("thinking"), fields.object("output_config")
    if (kind := thinking["type"]) is not None:
        if kind not in ("enabled", "disabled", "adaptive", "between_tools"):
            raise wrong("thinking", "thinking is of no known type.")
        options["think"] = kind != "disabled"
        if "budget_tokens" in thinking:
            options["think_budget"] = thinking.whole("budget_tokens", 1, 1 << 31)
    if "effort" in output:
        options["effort"] = output.text("effort")
    form = output.object("format") if "format" in output else fields.object("output_format")
    if (kind := form["type"]) is not None:
        if kind != "json_schema":
            raise wrong("output_config", "output_config.format is of no known type.")
        schema = {"name": "answer", "schema": form.need("schema")}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    return options


def _system(fields: Fields) -> list[dict[str, Any]]:
    if "system" not in fields:
        return []
    return [{"role": "system", "content": GAP.join(texts_of(fields["system"], "system", ("text",)))}]


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "messages is not a list of messages.")
    out: list[dict[str, Any]] = []
    for i, m in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(m, Mapping) or m.get("role") not in ("user", "assistant", "system"):
            raise wrong("messages", f"{where} is no message of the user, the assistant or the system.")
        content = m.get("content")
        if isinstance(content, str):
            out.append({"role": m["role"], "content": content})
        elif not isinstance(content, list) or not all(isinstance(b, Mapping) for b in content):
            raise wrong("messages", f"{where}.content is neither a text nor a list of blocks.")
        elif m["role"] == "assistant":
            out.append(_said(content, where))
        else:
            out.extend(_heard(m["role"], content, where))
    return out


def _said(content: list[Any], where: str) -> dict[str, Any]:
    """A message of the assistant."""
    text, reasoning, calls = [], [], []
    for i, block in enumerate(content):
        at, kind = f"{where}.content[{i}]", block.get("type")
        if kind == "text":
            text += texts_of([block], at, ("text",))
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            reasoning.append(block["thinking"])
        elif kind == "tool_use":
            id, name, given = block.get("id"), block.get("name"), block.get("input", {})
            if not isinstance(id, str) or not isinstance(name, str) or not isinstance(given, Mapping):
                raise wrong("messages", f"{at} needs an id, a name and an input.")
            calls.append(call_of(id, name, json.dumps(given, ensure_ascii=False)))
        elif kind != "redacted_thinking":
            raise wrong("messages", f"{at} is nothing that an assistant says.")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    return {**message, "tool_calls": calls} if calls else message


def _heard(role: str, content: list[Any], where: str) -> list[dict[str, Any]]:
    """A message of the user: results of tools, each a message of its own, and text."""
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        if block.get("type") == "tool_result":
            if not isinstance(id := block.get("tool_use_id"), str):
                raise wrong("messages", f"{at} needs the tool_use_id of its call.")
            said = GAP.join(texts_of(block.get("content") or "", f"{at}.content", ("text",)))
            if block.get("is_error") is True:
                said = f"Error: {said}" if said else "Error"
            out.append({"role": "tool", "tool_call_id": id, "content": said})
        elif block.get("type") == "document" and isinstance(source := block.get("source"), Mapping):
            if source.get("type") != "text" or not isinstance(source.get("data"), str):
                raise wrong("messages", f"{at} is a document that is no text: this model reads text alone.")
            texts.append(source["data"])
        else:
            texts += texts_of([block], at, ("text",))
    if texts or not out:
        out.append({"role": role, "content": GAP.join(texts)})
    return out


# What is answered


def error_of(problem: ApiError) -> dict[str, Any]:
    """An error as this API has it."""
    kind = ERRORS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    message = f"{problem.param}: {problem.message}" if problem.param else problem.message
    return {"type": "error", "error": {"type": kind, "message": message}}


def usage(stats: Stats) -> dict[str, Any]:
    """Tokens: those of the prompt that were read anew, those that were cached, those of the answer."""
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"thinking_tokens": stats.reasoning_tokens},
    }


def content_of(block: Block) -> dict[str, Any]:
    """A block of the answer. Arguments that were cut are none: an empty input."""
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    try:
        given = json.loads(block.text)
    except (ValueError, RecursionError):
        given = {}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": given}


def ending(completion: Completion) -> dict[str, Any]:
    """Why an answer ended."""
    if completion.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop}
    return {"stop_reason": REASONS.get(completion.finish_reason, "end_turn"), "stop_sequence": None}


class Form:
    """The JSON of one message, whole or as events."""

    def __init__(self, model: str):
        self.head: dict[str, Any] = {"id": f"msg_{secrets.token_hex(12)}", "type": "message"}
        self.head |= {"role": "assistant", "model": model}

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The message in one piece."""
        (completion,) = await completions_of(answer)
        content = [content_of(b) for b in blocks_of(completion)]
        return {**self.head, "content": content, **ending(completion), "usage": usage(completion.stats)}

    async def events(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The message as server-sent events."""
        blocks = Blocks()
        begun = False
        async with aclosing(answer.events()) as heard:
            async for _, said in heard:
                if not begun:
                    begun = True
                    yield self._start()
                steps = blocks.end() if isinstance(said, Done) else blocks.hear(said)
                for step in steps:
                    for value in _events_of(step):
                        yield event(value, value["type"])
                if isinstance(said, Done):
                    end = {"delta": ending(said.completion), "usage": usage(said.stats)}
                    yield event({"type": "message_delta", **end}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _start(self) -> bytes:
        nothing: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(Stats()),
        }
        return event({"type": "message_start", "message": {**self.head, **nothing}}, "message_start")


def _events_of(step: Step) -> list[dict[str, Any]]:
    block = step.block
    at = {"index": block.index}
    if step.what == "begin":
        empty = content_of(Block(block.kind, block.index, block.id, block.name))
        return [{"type": "content_block_start", **at, "content_block": empty}]
    if step.what == "more":
        delta = {
            "text": {"type": "text_delta", "text": step.text},
            "reasoning": {"type": "thinking_delta", "thinking": step.text},
            "call": {"type": "input_json_delta", "partial_json": step.text},
        }[block.kind]
        return [{"type": "content_block_delta", **at, "delta": delta}]
    signed = {"type": "content_block_delta", **at, "delta": {"type": "signature_delta", "signature": ""}}
    stop = {"type": "content_block_stop", **at}
    return [signed, stop] if block.kind == "reasoning" else [stop]


@endpoint(error_of)
async def messages(request: Request) -> Response:
    """One message of the assistant."""
    service = service_of(request)
    asked = Asked.of(await service.bodies.fields(request))
    answer, name = await service.ask(asked.model, asked.requests)
    form = Form(name)
    if not asked.stream:
        return Whole(form.whole(answer), error_of, answer.drop)

    def error_event(problem: ApiError) -> bytes:
        return event(error_of(problem), "error")

    return Stream(form.events(answer), error_of, error_event, answer.drop, service.limits.quiet_time)


@endpoint(error_of)
async def count_tokens(request: Request) -> Response:
    """Tokens that a message's prompt would take."""
    service = service_of(request)
    asked = Asked.of(await service.bodies.fields(request), counting=True)
    async with service.rack.using(asked.model) as lease:

        def count() -> int:
            (asking,) = asked.requests(lease.model)
            return len(asking.prompt(lease.model))

        return Reply({"input_tokens": await asyncio.to_thread(count)})
