"""The parent's side of `tinychat.process.worker`: starts the engine, sends requests, turns its lines into
events.

For programs with an asyncio loop; loads nothing heavy.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from tinychat.base.children import python_command
from tinychat.base.errors import TinychatError
from tinychat.process.asking import Asking
from tinychat.process.protocol import EVENTS, LINE_LIMIT, Died, EngineEvent, Request, from_json, to_json

LOOK = 0.5  # seconds between two looks at whether a process lives whose pipes somebody else holds
PATIENCE = 2.0  # seconds that a child told to end may take


class EngineClient(Asking):
    """A ChatEngine that is one process. Events go to `on_event`, on the loop that called `start`."""

    def __init__(self, on_event: Callable[[EngineEvent], None], command: Sequence[str] | None = None):
        super().__init__(on_event)
        self.command = list(command or python_command("tinychat.process.worker"))
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._complaints = b""  # the end of what the process wrote to stderr

    @property
    def pid(self) -> int | None:
        """The process, while it lives."""
        p = self._process
        return p.pid if p is not None and p.returncode is None else None

    async def start(self) -> None:
        """Start a process, in place of the one before if that still lives. Raises TinychatError if the system
        cannot.
        """
        await self.kill()
        self._complaints = b""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl+C and Ctrl+Z are not for it
            )
        except OSError as e:
            raise TinychatError(
                f"The engine does not start: {e.strerror or e}.",
                "Free some memory, or install tinychat again.",
            ) from e
        self._watcher = asyncio.create_task(self._watch(self._process))

    async def close(self) -> None:
        """End the process: politely, then not. Idempotent."""
        p = self._leave()
        if p is None:
            return
        with suppress(OSError, RuntimeError):
            if p.stdin is not None:
                p.stdin.close()
        await _ended(p, PATIENCE)
        await self._end(p)

    async def kill(self) -> None:
        """End the process now, whatever it is doing, and whatever it has started. Idempotent."""
        p = self._leave()
        if p is not None:
            await self._end(p)

    def _leave(self) -> asyncio.subprocess.Process | None:
        """Listen no more: what the process still says and its end are no events."""
        p, self._process = self._process, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self._answer_all()
        return p

    @staticmethod
    async def _end(process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own; also a stopped one ends
        await _ended(process, PATIENCE)
        # asyncio's way to close pipes that nobody reads any more.
        process._transport.close()  # type: ignore[attr-defined]

    def _put(self, request: Request) -> bool:
        p = self._process
        if p is None or p.returncode is not None or p.stdin is None or p.stdin.is_closing():
            return False
        p.stdin.write(to_json(request))
        return True

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Tell what the process says, and its end."""
        assert process.stdout is not None  # both are pipes
        assert process.stderr is not None
        listening: asyncio.Future[Any] = asyncio.gather(
            self._read(process.stdout), self._read_complaints(process.stderr)
        )
        ending: asyncio.Future[Any] = asyncio.ensure_future(_ended(process))
        try:
            await asyncio.wait({listening, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not (listening.done() and listening.exception()):
                # One of them is soon followed by the other, unless somebody else holds its pipes.
                await asyncio.wait({listening, ending}, timeout=PATIENCE)
            reason = ""
            if listening.done() and (e := listening.exception()) is not None:
                reason = f"it said something unintelligible ({type(e).__name__}: {str(e)[:200]})"
            elif not ending.done():
                reason = "it does not speak any more"
            await self._end(process)
        finally:
            listening.cancel()
            ending.cancel()
            # Else asyncio complains, on the terminal, that nobody asked how they ended.
            await asyncio.gather(listening, ending, return_exceptions=True)
        if process is self._process:
            self._process = None
            self._answer_all()
            self.on_event(Died(reason or self._why(process.returncode)))

    async def _read(self, stream: asyncio.StreamReader) -> None:
        pieces: list[bytes] = []  # of a line that has not ended
        size = 0
        while data := await stream.read(1 << 16):
            first, newline, rest = data.partition(b"\n")
            pieces.append(first)
            size += len(first)
            if size > LINE_LIMIT:
                raise ValueError(f"a line of more than {LINE_LIMIT} bytes")
            if not newline:
                continue
            *lines, last = rest.split(b"\n")
            for line in (b"".join(pieces), *lines):
                if (said := from_json(line, EVENTS)) is not None:
                    self._hear(said)
            pieces, size = [last], len(last)
            await asyncio.sleep(0)  # who talks without end leaves the screen its time

    async def _read_complaints(self, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(1 << 16):
            self._complaints = (self._complaints + data)[-4000:]

    def _why(self, code: int | None) -> str:
        if code == -signal.SIGKILL:
            return "it was killed (signal 9; the system does that when memory runs out)"
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"it crashed ({signal.Signals(-code).name})"
            return f"it crashed (signal {-code})"
        said = self._complaints.decode("utf-8", "replace").strip().splitlines()
        what = [line.removeprefix("Error: ") for line in said[-2:] if line.startswith("Error: ")] or said[-1:]
        return f"it ended with code {code}" + (f": {what[0][:200]}" if what else "")


async def _ended(process: asyncio.subprocess.Process, seconds: float = float("inf")) -> None:
    """Wait for the process, that long at most. In some versions of Python `wait` also waits for its pipes,
    which a child of its own may hold: so its code is looked at, too.
    """
    until = time.monotonic() + seconds
    waiting = asyncio.ensure_future(process.wait())
    try:
        while process.returncode is None and (left := until - time.monotonic()) > 0:
            await asyncio.wait({waiting}, timeout=min(LOOK, left))
    finally:
        waiting.cancel()
