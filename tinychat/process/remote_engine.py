"""The engine behind the chat screen where a server has the models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tinychat.process.connector import Connector
from tinychat.process.core import Core
from tinychat.process.local import LocalEngine
from tinychat.process.protocol import EngineEvent, Reply

ENDING = 1.0  # seconds that an engine which is closed is waited for


class RemoteCore(Core):
    """The core whose models are a server's."""

    def __init__(self, tell: Callable[[EngineEvent | Reply], None], connector: Connector):
        super().__init__(tell, connector)  # type: ignore[arg-type]  # a model as far as the core uses one
        self.connector = connector

    def _models(self) -> dict[str, Any]:
        return self.connector.list()

    def _count(self, text: str) -> int | None:
        return None

    def _limits(self) -> dict[str, float] | None:
        return None


class RemoteEngine(LocalEngine):
    """A ChatEngine whose answers come from a server."""

    def __init__(self, connector: Connector, on_event: Callable[[EngineEvent], None] = lambda event: None):
        super().__init__(on_event)
        self.connector = connector

    def _made_core(self, tell: Callable[[EngineEvent | Reply], None]) -> Core:
        return RemoteCore(tell, self.connector)

    async def close(self) -> None:
        """End the answer and whatever waits for the server. Idempotent."""
        core, self._core = self._core, None
        self._answer_all()
        if core is not None and self._thread is not None:
            core.end()
            self.connector.abort()
            await asyncio.to_thread(self._thread.join, ENDING)
