"""Generators for programs with an event loop: each runs in a thread of its own, and the loop goes on."""

from __future__ import annotations

import atexit
import contextvars
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:  # programs without a loop do not pay for importing it
    import asyncio

T = TypeVar("T")

AHEAD = 16  # items that wait for their reader, at most: a slow reader holds up the generator
PATIENCE = 10  # seconds that the end of the program waits for a step


class Work(threading.Thread, Generic[T]):
    """The thread of one generator, and what it has made and nobody has read.

    left  whether the reader is gone: the generator is told to end, and the rest is dropped
    """

    def __init__(self, make: Callable[[], Generator[T, None, None]], cancel: Callable[[], None]):
        super().__init__(name="answer", daemon=True)  # a reader that never comes must not keep the program
        self._make, self._cancel = make, cancel
        self._context = contextvars.copy_context()
        self._changed = threading.Condition()  # reentrant: a reader may be collected anywhere
        self._items: deque[T] = deque()
        self._most: float = AHEAD
        self._error: BaseException | None = None
        self._ended = self.left = False
        self._waiter: asyncio.Future[None] | None = None

    def run(self) -> None:
        """Run the generator to its end."""
        _running.add(self)
        try:
            self._context.run(self._run)
        except BaseException as e:  # it is the reader's
            self._error = e
        with self._changed:
            self._ended = True
            del self._make, self._cancel  # whoever keeps the thread does not keep what it worked for
            self._wake()

    def _run(self) -> None:
        items = self._make()
        if self.left:
            self._cancel()  # again: what is made begins without being cancelled
        for item in items:
            with self._changed:
                self._changed.wait_for(lambda: self.left or len(self._items) < self._most)
                if not self.left:
                    self._items.append(item)
                    self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(RuntimeError):  # its loop has ended
                waiter.get_loop().call_soon_threadsafe(_ready, waiter)

    def take(self) -> list[T] | asyncio.Future[None]:
        """The next item, in a list; none at the end; or what to wait for until there is one, on the running
        loop. Raises what the generator raised.
        """
        with self._changed:
            if self._items:
                self._changed.notify()
                return [self._items.popleft()]
            if self._ended or self.left:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return []
            return self._wait()

    def ending(self) -> asyncio.Future[None] | None:
        """What to wait for until the generator has ended; None when it has."""
        with self._changed:
            return None if self._ended else self._wait()

    def _wait(self) -> asyncio.Future[None]:
        import asyncio

        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("Two tasks read one answer at a time.")
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def leave(self) -> None:
        """Nobody reads on: tell the generator to end. May be called at any time, by any thread."""
        with self._changed:
            if not self.left and not self._ended:
                self.left = True
                self._items.clear()
                self._changed.notify()
                self._cancel()

    def finish(self) -> None:
        """Wait for the end of a generator that was told to end; what it still makes may be read later."""
        with self._changed:
            self._most = float("inf")
            self._changed.notify()
        self.join()


class Aside(AsyncIterator[T]):
    """What a generator makes, read by a coroutine: `async for item in aside`.

    The generator begins with the first item that is asked for, and is told to end between two steps when the
    task that reads is cancelled, when `aclose` is awaited (`async with aside` does), and when the reader is
    forgotten, as after a `break`.
    """

    def __init__(
        self,
        make: Callable[[], Generator[T, None, None]],
        cancel: Callable[[], None],
        begun: Callable[[Work[T]], None] = lambda work: None,
    ):
        """make: gives the generator, in its thread. cancel: has it end soon, from any thread. begun: is told
        of the thread when it begins.
        """
        self._work = Work(make, cancel)
        self._begun, self._started = begun, False

    def __aiter__(self) -> Aside[T]:
        return self

    async def __anext__(self) -> T:
        from asyncio import CancelledError, sleep

        if not self._started and not self._work.left:
            self._started = True
            self._work.start()
            self._begun(self._work)
        try:
            await sleep(0)  # where something waits already, other tasks run too, and a cancel is heard
            while not isinstance(got := self._work.take(), list):
                await got
        except CancelledError:
            await self.aclose()
            raise
        if not got:
            raise StopAsyncIteration
        return got[0]

    async def aclose(self) -> None:
        """Have the generator end, and wait until it has. Idempotent."""
        self._work.leave()
        while self._started and (ending := self._work.ending()) is not None:
            await ending

    async def __aenter__(self) -> Aside[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._work.leave()


def _ready(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


_running: WeakSet[Work] = WeakSet()


@atexit.register
def _end_all() -> None:
    """No thread is in the middle of a step when the program ends."""
    for work in list(_running):
        work.leave()
    for work in list(_running):
        work.join(PATIENCE)
