"""OpenAI's older /v1/completions: texts that are continued."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Done, Stats, TextDelta
from tinychat.engine.odds import MOST
from tinychat.serve.answers import Answer
from tinychat.serve.chat import choices_of, finish_reason, usage, variant
from tinychat.serve.fields import Fields
from tinychat.serve.odds import Certain, TextOdds
from tinychat.serve.problems import ApiError, wrong
from tinychat.serve.service import endpoint, error_of, service_of
from tinychat.serve.streams import Stream, Whole, event

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.chat_request import PromptRequest
    from tinychat.model import Model

LENGTH = 16  # tokens of a continuation that says nothing else, as the API has it


def prompts_of(fields: Fields) -> list[Any]:
    """The prompts: each a text or ids. Raises ApiError."""
    value = fields.need("prompt")
    several = isinstance(value, list) and value and all(isinstance(p, (str, list)) for p in value)
    prompts = value if several else [value]
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
        if not (isinstance(prompt, str) or ids):
            raise wrong("prompt", "prompt is a text, a list of token ids, or a list of these.")
    return prompts


@dataclasses.dataclass
class Asked:
    """A request for completions, as the JSON says it."""

    model: str | None
    prompts: list[Any]
    options: dict[str, Any]
    n: int
    stream: bool
    usage: bool

    @classmethod
    def of(cls, fields: Fields, choices: int) -> Asked:
        """Raises ApiError for what is wrong."""
        for name in ("suffix", "echo"):
            if name in fields and fields[name] not in (False, ""):
                raise ApiError(400, f"{name} is not supported.", param=name, code="unsupported_parameter")
        prompts, n = prompts_of(fields), fields.whole("n", 1, choices) or 1
        if len(prompts) * n > choices:
            raise wrong("prompt", f"{len(prompts)} prompts, {n} choices each; at most {choices} together.")
        options: dict[str, Any] = {"max_tokens": LENGTH, **fields.sampling()}
        if (top := fields.whole("logprobs", 0, MOST)) is not None:
            options["logprobs"] = top
        return cls(
            fields.text("model"),
            prompts,
            options,
            n,
            fields.flag("stream"),
            fields.object("stream_options").flag("include_usage"),
        )

    def requests(self, model: Model) -> list[PromptRequest]:
        """One for each choice. Raises UsageError."""
        firsts = [model.continuing(prompt, **self.options) for prompt in self.prompts]
        return [variant(first, i) for first in firsts for i in range(self.n)]

    def counts(self, stats: list[Stats]) -> dict[str, Any]:
        """Tokens that it took, each prompt once."""
        parts = [usage(stats[i : i + self.n]) for i in range(0, len(stats), self.n)]
        total = {name: sum(p[name] for p in parts) for name in parts[0] if name.endswith("_tokens")}
        cached = sum(p["prompt_tokens_details"]["cached_tokens"] for p in parts)
        return {**total, "prompt_tokens_details": {"cached_tokens": cached}}


class Form:
    """The JSON of one response, whole or in chunks."""

    def __init__(self, model: str, asked: Asked):
        kind = {"object": "text_completion", "created": int(time.time()), "model": model}
        self.head, self.asked = {"id": f"cmpl-{secrets.token_hex(12)}", **kind}, asked

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The response in one piece."""
        found = await choices_of(answer)
        choices = []
        for i, (c, told) in enumerate(found):
            odds = TextOdds(answer.model.tokenizer).of(told) if told else None
            choices.append(_choice(i, c.reasoning + c.text, finish_reason(c.finish_reason), odds))
        return {**self.head, "choices": choices, "usage": self.asked.counts([c.stats for c, _ in found])}

    async def chunks(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events."""
        stats: dict[int, Stats] = {}
        more = {"usage": None} if self.asked.usage else {}
        odds = [TextOdds(answer.model.tokenizer) for _ in range(len(answer))]
        certain = [Certain(answer.model.tokenizer) for _ in range(len(answer))]
        async with aclosing(answer.events()) as events:
            async for index, said in events:
                text = said.text if isinstance(said, TextDelta) else ""
                if (tokens := certain[index].of(said)) or text:
                    told = odds[index].of(tokens) if tokens else None
                    yield event({**self.head, "choices": [_choice(index, text, None, told)], **more})
                if isinstance(said, Done):
                    stats[index] = said.stats
                    choice = _choice(index, "", finish_reason(said.finish_reason))
                    yield event({**self.head, "choices": [choice], **more})
        if self.asked.usage:
            counts = self.asked.counts([stats[i] for i in sorted(stats)])
            yield event({**self.head, "choices": [], "usage": counts})
        yield event("[DONE]")


def _choice(index: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


@endpoint()
async def completions(request: Request) -> Response:
    """Continuations of texts."""
    service = service_of(request)
    asked = Asked.of(await service.bodies.fields(request), service.limits.choices)
    answer, name = await service.ask(asked.model, asked.requests)
    form = Form(name, asked)
    if not asked.stream:
        return Whole(form.whole(answer), error_of, answer.drop)
    chunks = form.chunks(answer)
    return Stream(chunks, error_of, lambda p: event(p.as_dict()), answer.drop, service.limits.quiet_time)
