"""Answers made on threads and heard on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tinychat.base.events import Done, Event, TextDelta
from tinychat.serve.desk import Desk, Place

if TYPE_CHECKING:
    from tinychat.model import Model

Work = Callable[[threading.Event], Iterator[Event]]  # the events of an answer that ends when the flag is set


class Answer:
    """The answers to one request: one, or several choices. Whoever stops listening cancels them, between two
    steps of the engine; a turn is given back when its thread is done, not before.
    """

    def __init__(
        self, desk: Desk, model: Model, work: Sequence[Work], over: Callable[[], None] = lambda: None
    ):
        """model: whose answer it is. over: called on the event loop when no thread works on it any more.

        Raises ApiError where there is no place in the line.
        """
        self.model = model
        self._desk, self._work, self._over = desk, work, over
        self._places = desk.admit(len(work))
        self._left = len(work)
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()
        self._first = asyncio.Event()  # the first choice has read the prompt: others find it
        self._begun = False
        self.cancel = threading.Event()

    def __len__(self) -> int:
        return len(self._work)

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """(index of the choice, event), Done last for each. Raises what went wrong with one of them."""
        self._begun = True
        tasks = [self._start(i, place) for i, place in enumerate(self._places)]
        try:
            going = len(tasks)
            while going:
                index, event = await self._heard.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    going -= 1
                    continue
                if isinstance(event, (TextDelta, Done)):
                    self._first.set()
                yield index, event
        finally:
            self.cancel.set()
            for task in tasks:
                task.cancel()

    def end(self, error: Exception) -> None:
        """Tell whoever listens that it has failed. On the event loop."""
        self._heard.put_nowait((0, error))

    def drop(self) -> None:
        """Nobody will listen: give the places back, unless `events` does."""
        if not self._begun:
            self._begun = True
            self.cancel.set()
            for place in self._places:
                self._leave(place)

    def _start(self, index: int, place: Place) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._begin(index, place))

        def begun(task: asyncio.Task[bool]) -> None:  # hears of a task that was cancelled before it ran, too
            if task.cancelled() or not task.result():
                self._leave(place)

        task.add_done_callback(begun)
        return task

    async def _begin(self, index: int, place: Place) -> bool:
        """Have the work done when its turn comes; whether a thread does it."""
        try:
            await place.turn
            if index:
                await self._first.wait()
            self._desk.work(partial(self._run, index, place))
            return True
        except Exception as e:
            self._heard.put_nowait((index, e))
            return False

    def _run(self, index: int, place: Place) -> None:
        """Make one answer; on a thread."""
        end: BaseException | None = None
        try:
            for event in self._work[index](self.cancel):
                self._tell(self._heard.put_nowait, (index, event))
        except BaseException as e:
            end = e
        self._tell(self._heard.put_nowait, (index, end))
        self._tell(self._leave, place)

    def _leave(self, place: Place) -> None:
        place.leave()
        self._left -= 1
        if not self._left:
            self._over()

    def _tell(self, hear: Callable, what: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(hear, what)
