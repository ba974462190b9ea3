"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from tinychat.base import arguments, tools
from tinychat.base.errors import UsageError
from tinychat.base.events import (
    Completion,
    Done,
    Event,
    FinishReason,
    Logprobs,
    Stats,
    TextDelta,
    ToolCallDelta,
)
from tinychat.chat_request import ChatRequest
from tinychat.serve import odds
from tinychat.serve.answers import Answer
from tinychat.serve.blocks import check_begun, request_of
from tinychat.serve.fields import Fields
from tinychat.serve.problems import wrong
from tinychat.serve.service import endpoint, error_of, service_of
from tinychat.serve.streams import Stream, Whole, event
from tinychat.text.response_format import response_format

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.model import Model

REASONS: dict[FinishReason, str] = {"context_full": "length", "cancelled": "stop", "error": "stop"}


@dataclasses.dataclass
class Asked:
    """A request for a chat completion, as the JSON says it."""

    model: str | None
    messages: Any
    options: dict[str, Any]
    n: int
    stream: bool
    usage: bool

    @classmethod
    def of(cls, fields: Fields, choices: int) -> Asked:
        """Raises ApiError for what is wrong."""
        fields.need("messages")
        messages = fields.check("messages", _messages)
        options = {**fields.sampling(), **_tools(fields)}
        if (top := odds.asked(fields)) is not None:
            options["logprobs"] = top
        options |= _thought(fields)
        if _goes_on(fields):
            check_begun(messages)
            options["go_on"] = True
        if (form := fields.check("response_format", lambda name, value: response_format(value))) is not None:
            options["response_format"] = form
        return cls(
            fields.text("model"),
            messages,
            options,
            fields.whole("n", 1, choices) or 1,
            fields.flag("stream"),
            fields.object("stream_options").flag("include_usage"),
        )

    def requests(self, model: Model) -> list[ChatRequest]:
        """One for each choice. Raises UsageError."""
        first = request_of(model, self.messages, self.options)
        return [first, *(variant(first, i) for i in range(1, self.n))]


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    """The conversation, with the newer name of the system's role as its older one."""
    if not isinstance(value, list):
        raise UsageError(f"{name} is {arguments.shown(value)}.", f"Give a list: [{arguments.MESSAGE}].")
    found = arguments.messages(value)
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in found]


def _goes_on(fields: Fields) -> bool:
    """Whether the last message is an answer that goes on, as vLLM and SGLang are told so."""
    goes_on, generates = (
        fields.check(n, arguments.flag) for n in ("continue_final_message", "add_generation_prompt")
    )
    if (generates is False and not goes_on) or (generates and goes_on):
        raise wrong(
            "add_generation_prompt", "Of add_generation_prompt and continue_final_message one is true."
        )
    return bool(goes_on)


def _tools(fields: Fields) -> dict[str, Any]:
    """The tools, and what is to be done with them."""
    given = fields.check("tools", lambda name, value: tools.tools(value)) or []
    if not given:
        return {}
    choice = fields.check("tool_choice", lambda name, value: tools.tool_choice(value, given))
    several = fields.check("parallel_tool_calls", arguments.flag)
    options = {"tools": given, "tool_choice": choice, "parallel_tool_calls": several}
    return {name: value for name, value in options.items() if value is not None}


def _thought(fields: Fields) -> dict[str, Any]:
    """Whether to reason first, and how much: OpenAI's field, and the switch that other servers know."""
    options: dict[str, Any] = {}
    think = fields.object("chat_template_kwargs").check("enable_thinking", arguments.flag)
    if think is not None:
        options["think"] = think
    if (effort := fields.text("reasoning_effort")) is not None:
        options |= {"think": False} if effort == "none" else {"effort": effort}
    return options


def variant(request: Any, i: int) -> Any:
    """The request for choice i: a seed that was given would say the same again."""
    seed = request.params.seed
    return request if seed is None else dataclasses.replace(request, params=request.params.but(seed=seed + i))


def usage(stats: Sequence[Stats]) -> dict[str, Any]:
    """Tokens that a request took; the prompt is read once for all choices."""
    prompt, made = stats[0].prompt_tokens, sum(s.generated_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(s.reasoning_tokens for s in stats)},
    }


def finish_reason(reason: FinishReason) -> str:
    """Why an answer ended, in the API's words."""
    return REASONS.get(reason, reason)


async def completions_of(answer: Answer) -> list[Completion]:
    """All choices, when they are there."""
    return [completion for completion, _ in await choices_of(answer)]


async def choices_of(answer: Answer) -> list[tuple[Completion, list[Logprobs]]]:
    """All choices with the log-probabilities of their tokens, when they are there."""
    found: dict[int, Completion] = {}
    told: defaultdict[int, list[Logprobs]] = defaultdict(list)
    certain: defaultdict[int, odds.Certain] = defaultdict(partial(odds.Certain, answer.model.tokenizer))
    async with aclosing(answer.events()) as events:
        async for index, said in events:
            told[index] += certain[index].of(said)
            if isinstance(said, Done):
                found[index] = said.completion
    return [(found[i], told[i]) for i in sorted(found)]


def logprobs_of(answer: Answer, told: Sequence[Logprobs]) -> dict[str, Any] | None:
    """The `logprobs` of a choice."""
    tokenizer = answer.model.tokenizer
    return {"content": [odds.chat_entry(tokenizer, t) for t in told], "refusal": None} if told else None


def message_of(completion: Completion) -> dict[str, Any]:
    """The assistant's message."""
    message = {**completion.message(), "refusal": None}
    if completion.tool_calls and not completion.text:
        message["content"] = None
    return message


def delta_of(said: Event) -> dict[str, Any]:
    """What an event adds to the assistant's message; empty where that is nothing."""
    delta: dict[str, Any] = {}
    if isinstance(said, TextDelta):
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.text:
            delta["content"] = said.text
    if isinstance(said, ToolCallDelta) and not said.damaged:
        call: dict[str, Any] = {"index": said.index, "function": {"arguments": said.arguments}}
        if said.name:
            call = {"index": said.index, "id": said.id, "type": "function"}
            call["function"] = {"name": said.name, "arguments": said.arguments}
        delta["tool_calls"] = [call]
    return delta


class Form:
    """The JSON of one response, whole or in chunks."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The response in one piece."""
        found = await choices_of(answer)
        choices = [
            {
                "index": i,
                "message": message_of(c),
                "logprobs": logprobs_of(answer, told),
                "finish_reason": finish_reason(c.finish_reason),
            }
            for i, (c, told) in enumerate(found)
        ]
        head = {**self.head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage([c.stats for c, _ in found])}

    async def chunks(self, answer: Answer, with_usage: bool) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events."""
        stats: dict[int, Stats] = {}
        begun: set[int] = set()
        certain: defaultdict[int, odds.Certain] = defaultdict(partial(odds.Certain, answer.model.tokenizer))
        async with aclosing(answer.events()) as events:
            async for index, said in events:
                if index not in begun:
                    begun.add(index)
                    yield self._chunk(index, {"role": "assistant", "content": ""}, None, with_usage)
                told = certain[index].of(said)
                if (delta := delta_of(said)) or told:
                    delta = delta or {"content": ""}
                    yield self._chunk(index, delta, None, with_usage, logprobs_of(answer, told))
                if isinstance(said, Done):
                    stats[index] = said.stats
                    yield self._chunk(index, {}, finish_reason(said.finish_reason), with_usage)
        if with_usage:
            counts = usage([stats[i] for i in sorted(stats)])
            yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": counts})
        yield event("[DONE]")

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, with_usage: bool, logprobs: Any = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if with_usage else {}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})


@endpoint()
async def chat_completions(request: Request) -> Response:
    """One answer, or several choices, to a conversation."""
    service = service_of(request)
    asked = Asked.of(await service.bodies.fields(request), service.limits.choices)
    answer, name = await service.ask(asked.model, asked.requests)
    form = Form(name)
    if not asked.stream:
        return Whole(form.whole(answer), error_of, answer.drop)
    chunks = form.chunks(answer, asked.usage)
    return Stream(chunks, error_of, lambda p: event(p.as_dict()), answer.drop, service.limits.quiet_time)
