"""Responses as server-sent events, and waiting for an answer no longer than the client does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from tinychat.serve import problems
from tinychat.serve.problems import ApiError
from tinychat.serve.replies import Reply

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")

ALIVE = b": still here\n\n"  # a comment, which every client passes over
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event: a JSON value, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode(errors="replace")


async def _gone(receive: Receive) -> None:
    """Until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; it is cancelled, and None is returned, when the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, gone):
            pending.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class Whole(Response):
    """An answer in one piece, which is made while the client waits for it."""

    def __init__(
        self,
        work: Coroutine[Any, Any, dict[str, Any]],
        error: Callable[[ApiError], Any],
        over: Callable[[], None],
    ):
        """error: the body of an error, as the API has it. over: called at the end, however that is."""
        super().__init__()
        self._work, self._error, self._over = work, error, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for it, and send it."""
        try:
            made = await unless_gone(receive, self._work)
        except Exception as e:
            problem = problems.of(e)
            response = Reply(self._error(problem), problem.status, problem.headers)
            return await response(scope, receive, send)
        finally:
            self._over()
        if made is not None:
            await Reply(made)(scope, receive, send)


class Stream(Response):
    """Server-sent events. Until the first one is there, an error is a response of its own; later it is an
    event. While none comes, comments say that the server is at work.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        error: Callable[[ApiError], Any],
        error_event: Callable[[ApiError], bytes],
        over: Callable[[], None],
        quiet_time: float,
    ):
        """error: the body of an error response; error_event: an error as an event. over: called at the end,
        however that is.
        """
        super().__init__()
        self._chunks, self._error, self._error_event = chunks, error, error_event
        self._over, self._quiet = over, quiet_time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        line = _Line(send)
        gone, talk = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._talk(line))
        try:
            while not gone.done():
                patience = line.patience(self._quiet)
                await asyncio.wait({talk, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if talk.done():
                    break
                if not gone.done() and line.patience(self._quiet) <= 0:
                    await line.say(ALIVE)
            if talk.done():
                await talk
                await line.say(b"", more=False)
        except Exception as e:
            problem = problems.of(e)
            if line.started:
                await line.say(self._error_event(problem), more=False)
            else:
                response = Reply(self._error(problem), problem.status, problem.headers)
                await response(scope, receive, send)
        finally:
            for task in (gone, talk):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await talk
            await self._chunks.aclose()
            self._over()

    async def _talk(self, line: _Line) -> None:
        # A loop of its own, since to wait for each event and the client at once costs as much as the event.
        async for chunk in self._chunks:
            await line.say(chunk)


class _Line:
    """The body of a stream as it is sent."""

    def __init__(self, send: Send):
        self._send = send
        self._last = time.monotonic()  # when something was sent
        self._busy = False
        self.started = False

    async def say(self, data: bytes, more: bool = True) -> None:
        """Send a piece, the headers before the first one."""
        self._busy = True
        if not self.started:
            self.started = True
            head = [(b"content-type", b"text/event-stream; charset=utf-8")]
            head += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._last, self._busy = time.monotonic(), False

    def patience(self, quiet: float) -> float:
        """Seconds until nothing will have been sent for so many."""
        return quiet if self._busy else max(0.0, self._last + quiet - time.monotonic())
