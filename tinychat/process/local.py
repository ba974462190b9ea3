"""A ChatEngine in this process, for asyncio programs that hold a model themselves."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

from tinychat.process.asking import Asking
from tinychat.process.core import Core, Loader, load_model
from tinychat.process.protocol import EngineEvent, Reply, Request


class LocalEngine(Asking):
    """The engine's core on a thread of its own. Events go to `on_event`, on the loop that called `start`.

    Unlike a process it cannot be ended in the middle of something: `close` waits until the step or the load
    that is running has ended.
    """

    def __init__(self, on_event: Callable[[EngineEvent], None], load: Loader = load_model):
        super().__init__(on_event)
        self._load = load
        self._core: Core | None = None
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """This process, once it has begun."""
        return os.getpid() if self._core is not None else None

    async def start(self) -> None:
        """Begin, without a model."""
        await self.close()
        loop = asyncio.get_running_loop()

        def tell(said: EngineEvent | Reply) -> None:
            loop.call_soon_threadsafe(self._hear_from, core, said)

        core = self._core = self._made_core(tell)
        self._thread = threading.Thread(target=core.run, name="engine", daemon=True)
        self._thread.start()

    def _made_core(self, tell: Callable[[EngineEvent | Reply], None]) -> Core:
        return Core(tell, self._load)

    def _hear_from(self, core: Core, said: EngineEvent | Reply) -> None:
        if core is self._core:  # what another one said before it was closed is no event
            self._hear(said)

    def _put(self, request: Request) -> bool:
        if self._core is None:
            return False
        self._core.take(request)
        return True

    async def close(self) -> None:
        """End the answer, keep the KV caches, give the model back. Idempotent."""
        core, self._core = self._core, None
        self._answer_all()
        if core is not None and self._thread is not None:
            core.end()
            await asyncio.to_thread(self._thread.join)
