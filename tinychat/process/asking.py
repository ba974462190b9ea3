"""The requests of a ChatEngine as methods, and the replies that questions wait for: what its implementations
share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from tinychat.conversation import Message
from tinychat.process.protocol import (
    Answer,
    Cancel,
    Count,
    EndThought,
    EngineEvent,
    Head,
    Limits,
    Load,
    Models,
    Reply,
    Request,
)


class Asking:
    """Says requests through `_put`, which a subclass has; `_hear` takes what comes back."""

    def __init__(self, on_event: Callable[[EngineEvent], None]):
        self.on_event = on_event
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0

    def _put(self, request: Request) -> bool:
        """Hand a request over without waiting; False if nobody is there to hear it."""
        raise NotImplementedError

    def load(self, model: str, options: dict[str, Any]) -> None:
        """Load a model in place of the present one. → Loading…, then Loaded or Failed."""
        self._put(Load(model, options))

    def answer(
        self,
        chat: str,
        path: Sequence[Message],
        system: str | None,
        params: dict[str, Any],
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Answer the last message of `path`. → Reading…, Began, Text…, then Finished or Failed."""
        self._put(Answer(chat, list(path), system, params, list(tools)))

    def cancel(self) -> None:
        """Stop the running answer; its Finished says "cancelled"."""
        self._put(Cancel())

    def end_thought(self) -> None:
        """Have the running answer close its thought, if there is one."""
        self._put(EndThought())

    async def count(self, text: str) -> int | None:
        """Tokens of a text; None while no model is loaded."""
        return await self._ask(lambda n: Count(n, text))

    async def head(self, text: str, tokens: int) -> str | None:
        """The beginning of a text that has at most that many tokens; None while no model is loaded."""
        return await self._ask(lambda n: Head(n, text, tokens))

    async def models(self) -> dict[str, Any] | None:
        """Models as `tinychat.process.core.list_models` tells them; None if the engine does not say."""
        return await self._ask(Models)

    async def limits(self) -> dict[str, float] | None:
        """weight_bytes_per_token and read_bandwidth_gb_s; None while they cannot be measured."""
        return await self._ask(Limits)

    async def _ask(self, question: Callable[[int], Request]) -> Any:
        self._asked += 1
        number = self._asked
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            return await future if self._put(question(number)) else None
        finally:
            self._replies.pop(number, None)

    def _hear(self, said: EngineEvent | Reply) -> None:
        if not isinstance(said, Reply):
            self.on_event(said)
        elif (future := self._replies.get(said.id)) is not None and not future.done():
            future.set_result(said.value)

    def _answer_all(self) -> None:
        """Nobody will answer what was asked."""
        for future in self._replies.values():
            if not future.done():
                future.set_result(None)
