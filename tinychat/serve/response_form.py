"""The JSON of a response of OpenAI's /v1/responses, whole or as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from tinychat.base.events import Done, FinishReason, Stats
from tinychat.serve.answers import Answer
from tinychat.serve.blocks import Block, Blocks, Kind, Step, blocks_of, message_of
from tinychat.serve.chat import completions_of
from tinychat.serve.problems import ApiError
from tinychat.serve.streams import event

CUT: dict[FinishReason, str] = {"length": "max_output_tokens", "context_full": "max_output_tokens"}
IDS: dict[Kind, str] = {"text": "msg", "reasoning": "rs", "call": "fc"}
PARTS: dict[Kind, str] = {"text": "output_text", "reasoning": "reasoning_text"}  # a call has none


def usage(stats: Stats) -> dict[str, Any]:
    """Tokens that a response took."""
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens},
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": stats.reasoning_tokens},
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }


def part_of(block: Block) -> dict[str, Any]:
    """The content of a text or a reasoning."""
    part = {"type": PARTS[block.kind], "text": block.text}
    return {**part, "annotations": [], "logprobs": []} if block.kind == "text" else part


class Form:
    """One response. `keep` hears of it when it is whole, with the message that it is in a conversation."""

    def __init__(
        self,
        model: str,
        echo: dict[str, Any],
        keep: Callable[[dict[str, Any], dict[str, Any]], None] = lambda response, message: None,
    ):
        self._key = secrets.token_hex(12)
        self.head = {"id": f"resp_{self._key}", "object": "response", "created_at": int(time.time())}
        self.head |= {"model": model, "error": None, "incomplete_details": None, **echo}
        self._keep = keep
        self._said = 0  # events

    def item(self, block: Block, status: str = "completed") -> dict[str, Any]:
        """A block as an item of the output; in progress, it is still empty."""
        item: dict[str, Any] = {"id": f"{IDS[block.kind]}_{self._key}{block.index}", "status": status}
        parts = [part_of(block)] if status != "in_progress" and block.kind != "call" else []
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": parts}
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": parts}
        call = {"type": "function_call", "call_id": block.id, "name": block.name}
        return {**item, **call, "arguments": "" if status == "in_progress" else block.text}

    def _ended(self, reason: FinishReason, stats: Stats, blocks: list[Block]) -> dict[str, Any]:
        cut = CUT.get(reason)
        last = "incomplete" if cut else "completed"
        output = [self.item(b, last if b is blocks[-1] else "completed") for b in blocks]
        details = {"reason": cut} if cut else None
        made = {**self.head, "status": last, "incomplete_details": details, "output": output}
        made["usage"] = usage(stats)
        self._keep(made, message_of(blocks))
        return made

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The response in one piece."""
        (completion,) = await completions_of(answer)
        return self._ended(completion.finish_reason, completion.stats, blocks_of(completion))

    async def events(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events."""
        blocks = Blocks()
        empty = {**self.head, "status": "in_progress", "output": [], "usage": None}
        async with aclosing(answer.events()) as heard:
            async for _, said in heard:
                if not self._said:
                    yield self._event("response.created", response=empty)
                    yield self._event("response.in_progress", response=empty)
                for step in blocks.end() if isinstance(said, Done) else blocks.hear(said):
                    for name, value in self._events_of(step):
                        yield self._event(name, **value)
                if isinstance(said, Done):
                    made = self._ended(said.finish_reason, said.stats, blocks.all)
                    yield self._event(f"response.{made['status']}", response=made)

    def failed(self, problem: ApiError) -> dict[str, Any]:
        """The event of a response that cannot go on."""
        error = {"code": problem.code or "server_error", "message": problem.message}
        response = {**self.head, "status": "failed", "error": error, "output": [], "usage": None}
        return {"type": "response.failed", "sequence_number": self._said, "response": response}

    def _event(self, kind: str, **value: Any) -> bytes:
        made = event({"type": kind, "sequence_number": self._said, **value}, kind)
        self._said += 1
        return made

    def _events_of(self, step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
        block, output = step.block, {"output_index": step.block.index}
        item = self.item(block, "in_progress" if step.what == "begin" else "completed")
        at = {**output, "item_id": item["id"]}
        if block.kind == "call":
            what, last = "function_call_arguments", {"arguments": block.text, "name": block.name}
        else:
            what, last, at = PARTS[block.kind], {"text": block.text}, {**at, "content_index": 0}
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if step.what == "begin":
            yield "response.output_item.added", {**output, "item": item}
            if block.kind != "call":
                part = part_of(Block(block.kind, block.index))
                yield "response.content_part.added", {**at, "part": part}
        elif step.what == "more":
            yield f"response.{what}.delta", {**at, "delta": step.text, **logprobs}
        else:
            yield f"response.{what}.done", {**at, **last, **logprobs}
            if block.kind != "call":
                yield "response.content_part.done", {**at, "part": part_of(block)}
            yield "response.output_item.done", {**output, "item": item}
