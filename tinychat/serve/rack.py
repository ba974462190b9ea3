"""The models that are served: loaded when they are asked for, unloaded when room is needed or nobody asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat.base.errors import DeviceLostError, MemoryBudgetError
from tinychat.engine.shelf import Shelf
from tinychat.serve.problems import ApiError, busy

if TYPE_CHECKING:
    from tinychat.model import Model

Load = Callable[[], "Model"]
ROOM_SECONDS = 0.1  # between two looks whether a model that is in the way is free


def served_name(model: str) -> str:
    """The name by which clients ask for a model: a path would tell them about this machine's folders."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() or path.is_absolute() else model


class Held:
    """A model that may be loaded."""

    def __init__(self, name: str, load: Load):
        self.name, self.load = name, load
        self.model: Model | None = None
        self.users = 0
        self.used = time.monotonic()
        self.created = int(time.time())


class Lease:
    """The use of a loaded model, until it is given back."""

    def __init__(self, held: Held, model: Model):
        self.name, self.model = held.name, model
        self._held: Held | None = held
        held.users += 1

    def end(self) -> None:
        """Give it back. Idempotent."""
        if self._held is not None:
            self._held.users -= 1
            self._held.used = time.monotonic()
            self._held = None


class Rack:
    """Models by name. Changes happen on the event loop; loading and closing on threads, one at a time."""

    def __init__(
        self, models: Mapping[str, Load], keep_alive: float | None = None, folder: Path | None = None
    ):
        """models: how each is loaded; the first one is meant where a request names none.
        keep_alive: seconds after which a model that nobody asks is unloaded; None: when room is needed.
        folder: where conversations are kept that memory has no room for; None: nowhere.
        """
        self._folder = folder
        self.models = {name: Held(name, load) for name, load in models.items()}
        self.keep_alive = keep_alive
        self._changing = asyncio.Lock()
        self._closing: Callable[[Model], None] = lambda model: model.close()

    def when_closing(self, close: Callable[[Model], None]) -> None:
        """What is done to close a model; on a thread."""
        self._closing = close

    async def lease(self, name: str | None) -> Lease:
        """The model of that name, loaded. Raises ApiError: 404 where it is not served; and what loading
        raises.
        """
        held = self.models.get(name) if name else next(iter(self.models.values()))
        if held is None:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"The model {name[:100] if name else ''} is not served here. Served: {known}.",
                param="model",
                code="model_not_found",
            )
        if held.model is None:
            async with self._changing:
                if held.model is None:
                    held.model = await self._loaded(held)
        return Lease(held, held.model)

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Lease]:
        """The use of a model as a context."""
        lease = await self.lease(name)
        try:
            yield lease
        finally:
            lease.end()

    async def _loaded(self, held: Held) -> Model:
        """Load it; where memory is short, those that nobody uses make way, the longest idle first."""
        while True:
            try:
                return await asyncio.to_thread(self._load, held)
            except MemoryBudgetError as e:
                others = [h for h in self.models.values() if h.model is not None]
                idle = [h for h in others if not h.users]
                if not others:
                    raise
                if not idle:
                    raise busy(503, f"{e.what} Other models are in use. Try again later.", 30) from e
                await self._unload(min(idle, key=lambda h: h.used))

    def _load(self, held: Held) -> Model:
        model = held.load()
        model.shelf = Shelf(model, self._folder)
        return model

    async def _unload(self, held: Held) -> None:
        model, held.model = held.model, None
        if model is not None:
            await asyncio.to_thread(self._close, model)

    def _close(self, model: Model) -> None:
        if model.shelf is not None:
            model.shelf.close()
            model.shelf = None
        self._closing(model)

    async def save(self) -> None:
        """Keep on disk what conversations have in memory."""
        for model in [h.model for h in self.models.values() if h.model is not None]:
            if model.shelf is not None:
                await asyncio.to_thread(model.shelf.save)

    async def lost(self, model: Model, error: BaseException) -> None:
        """After an error that a model does not recover from, it is loaded again when it is asked for."""
        if isinstance(error, DeviceLostError):
            async with self._changing:
                for held in self.models.values():
                    if held.model is model:
                        await self._unload(held)

    async def tidy(self) -> None:
        """Unload what nobody has asked for in `keep_alive` seconds."""
        if self.keep_alive is None:
            return
        async with self._changing:
            for held in self.models.values():
                idle = held.model is not None and not held.users
                if idle and time.monotonic() - held.used > self.keep_alive:
                    await self._unload(held)

    async def close(self) -> None:
        """Close every model."""
        async with self._changing:
            for held in self.models.values():
                await self._unload(held)
