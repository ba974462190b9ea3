"""The parent's side of `tinychat.process.worker`: starts the engine, sends requests, turns its lines into
events.

For programs with an asyncio loop; loads nothing heavy.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from tinychat.base.children import python_command
from tinychat.base.errors import TinychatError

LINE_LIMIT = 1 << 26
LOOK = 0.5  # seconds between two looks at whether a process lives whose pipes somebody else holds
PATIENCE = 2.0  # seconds that a child told to end may take


@dataclass(frozen=True)
class Loading:
    """On the way to a model. `total` is 0 when unknown; both are bytes while downloading."""

    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Loaded:
    """Ready to answer. `facts`: what `Model.describe` says; `sampling`: the model's own defaults."""

    facts: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    has_template: bool = True


@dataclass(frozen=True)
class Reading:
    """The prompt is being read: `tokens` of `total`, `rate` of them a second."""

    tokens: int
    total: int
    rate: float


@dataclass(frozen=True)
class Began:
    """The prompt is read and the first token is here. `prompt_text`: the end of what the template wrote;
    `prompt_tokens`: of the whole conversation so far.
    """

    prompt_text: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Text:
    """More of what the model writes, with reasoning and its markers (`tinychat.text.reasoning` splits it).
    `tokens` so far in all; `thought`: how many of them came before the answer, where there is reasoning.
    """

    text: str
    tokens: int
    thought: int | None = None


@dataclass(frozen=True)
class Noticed:
    """Something the user should know."""

    message: str


@dataclass(frozen=True)
class Finished:
    """The answer as the session keeps it."""

    content: str
    ids: list[int]
    prompt_ids: list[int]
    prompt_text: str
    finish_reason: str
    stats: dict[str, Any]
    thought: int | None = None


@dataclass(frozen=True)
class Failed:
    """What is wrong and what to do; `during` is "load" or "answer"."""

    what: str
    todo: str
    during: str


@dataclass(frozen=True)
class Died:
    """The process is gone and nobody asked it to go; `reason` is one line."""

    reason: str


EngineEvent = Loading | Loaded | Reading | Began | Text | Noticed | Finished | Failed | Died
_EVENTS = {
    "loading": Loading,
    "loaded": Loaded,
    "reading": Reading,
    "began": Began,
    "text": Text,
    "notice": Noticed,
    "done": Finished,
    "failed": Failed,
}


class EngineClient:
    """One engine process. Events go to `on_event`, on the loop that called `start`."""

    def __init__(self, on_event: Callable[[EngineEvent], None], command: Sequence[str] | None = None):
        self.on_event = on_event
        self.command = list(command or python_command("tinychat.process.worker"))
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task | None = None
        self._replies: dict[int, asyncio.Future] = {}
        self._asked = 0
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

    def load(self, model: str, options: dict[str, Any]) -> None:
        """Load a model in place of the present one. → Loading…, then Loaded or Failed."""
        self._send(op="load", model=model, options=options)

    def answer(self, chat: str, path: list[dict], system: str | None, params: dict[str, Any]) -> None:
        """Answer the user message at the end of `path`. → Reading…, Began, Text…, then Finished or Failed."""
        self._send(op="answer", chat=chat, path=path, system=system, params=params)

    def cancel(self) -> None:
        """Stop the running answer; its Finished says "cancelled"."""
        self._send(op="cancel")

    async def count(self, text: str) -> int | None:
        """Tokens of a text; None while no model is loaded."""
        return await self._ask(op="count", text=text)

    async def head(self, text: str, tokens: int) -> str | None:
        """The beginning of a text that has at most that many tokens; None while no model is loaded."""
        return await self._ask(op="head", text=text, tokens=tokens)

    async def models(self) -> dict[str, Any] | None:
        """What `tinychat.process.worker.list_models` tells; None if the engine does not say."""
        return await self._ask(op="models")

    async def limits(self) -> dict[str, float] | None:
        """weight_bytes_per_token and read_bandwidth_gb_s; None while they cannot be measured."""
        return await self._ask(op="limits")

    async def close(self) -> None:
        """End the process: politely, then not. Idempotent."""
        p = self._leave()
        if p is None:
            return
        with suppress(OSError, RuntimeError):
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
        process._transport.close()  # asyncio's way to close pipes that nobody reads any more

    def _send(self, **request: Any) -> bool:
        p = self._process
        if p is None or p.returncode is not None or p.stdin.is_closing():
            return False
        p.stdin.write(json.dumps(request).encode() + b"\n")
        return True

    async def _ask(self, **request: Any) -> Any:
        self._asked += 1
        number = self._asked
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            return await future if self._send(id=number, **request) else None
        finally:
            self._replies.pop(number, None)

    def _answer_all(self) -> None:
        """Nobody will answer what was asked."""
        for future in self._replies.values():
            if not future.done():
                future.set_result(None)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Tell what the process says, and its end."""
        listening = asyncio.gather(self._read(process.stdout), self._read_complaints(process.stderr))
        ending = asyncio.ensure_future(_ended(process))
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
                self._hear(line)
            pieces, size = [last], len(last)
            await asyncio.sleep(0)  # who talks without end leaves the screen its time

    def _hear(self, line: bytes) -> None:
        event = json.loads(line)
        kind = event.pop("ev")
        if kind != "reply":
            self.on_event(_checked(_EVENTS[kind](**event)))
        elif (future := self._replies.get(event["id"])) is not None and not future.done():
            future.set_result(event["value"])

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


_KINDS = {
    "str": str,
    "int": int,
    "bool": bool,
    "list[int]": list,
    "dict[str, Any]": dict,
    "float": (int, float),
}


def _checked(event: EngineEvent) -> EngineEvent:
    """The event, if its fields have the kinds that they should. Raises TypeError."""
    for f in fields(event):
        kind, _, maybe = f.type.partition(" | ")
        value = getattr(event, f.name)
        if not isinstance(value, _KINDS[kind]) and not (maybe == "None" and value is None):
            raise TypeError(f"{f.name} is {value!r}")
    return event
