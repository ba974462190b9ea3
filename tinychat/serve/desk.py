"""Turns: so many answers are made at once, others stand in line, and the line has an end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tinychat.serve.problems import ApiError, busy

FIRST_GUESS = 5.0  # seconds of an answer, while none has ended yet


class Place:
    """A place in the line, and then a turn. It is given back exactly once, however the answer ends."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began = 0.0
        self._left = False

    def leave(self) -> None:
        """Give the place or the turn back. Idempotent; on the event loop."""
        if not self._left:
            self._left = True
            self._desk._left(self)


class Desk:
    """Gives turns in the order of the requests. Everything but the work itself happens on the event loop."""

    def __init__(self, parallel: int, waiting: int):
        self.parallel, self.waiting = parallel, waiting
        self.running: set[Place] = set()
        self.line: deque[Place] = deque()
        self.closed = False
        self._seconds = FIRST_GUESS  # of an answer, lately
        self._threads = ThreadPoolExecutor(parallel, "answer")

    def admit(self, n: int = 1) -> list[Place]:
        """Places for n answers of one request. Raises ApiError: 429 where the line has no room for all of
        them, 503 when the server is ending.
        """
        if self.closed:
            raise busy(503, "The server is ending.", 10)
        free = self.parallel - len(self.running)
        if len(self.line) + n > self.waiting + free:
            seconds = self._seconds * (len(self.line) + 1) / self.parallel
            raise busy(429, f"{len(self.line)} requests wait already. Try again later.", seconds)
        places = [Place(self) for _ in range(n)]
        self.line.extend(places)
        self._call()
        return places

    def work(self, job: Callable[[], None]) -> asyncio.Future[None]:
        """Run a job whose turn it is on a thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, job)

    def close(self) -> None:
        """Refuse whoever comes or waits. Idempotent; running answers go on."""
        self.closed = True
        for place in list(self.line):
            if not place.turn.done():
                place.turn.set_exception(ApiError(503, "The server is ending."))
                place.turn.exception()  # nobody may be left to hear it

    def join(self) -> None:
        """Wait until no thread works any more."""
        self._threads.shutdown(wait=True)

    def _call(self) -> None:
        while self.line and len(self.running) < self.parallel:
            place = self.line.popleft()
            self.running.add(place)
            place.began = time.monotonic()
            if not place.turn.done():
                place.turn.set_result(None)

    def _left(self, place: Place) -> None:
        if place in self.running:
            self.running.remove(place)
            self._seconds += 0.2 * (time.monotonic() - place.began - self._seconds)
        with suppress(ValueError):
            self.line.remove(place)
        self._call()
