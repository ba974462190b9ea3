"""The parent's side of `tinychat.worker`: starts the engine, sends requests, turns its lines into events.

For programs with an asyncio loop; loads nothing heavy.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tinychat.children import python_command

LINE_LIMIT = 1 << 28
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
class Began:
    """The prompt is read and the first token is here. `prompt_text`: the end of what the template wrote;
    `prompt_tokens`: of the whole conversation so far.
    """

    prompt_text: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Text:
    """More of the answer. `tokens` so far in all; `thought`: how many of them came before `</think>`."""

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


EngineEvent = Loading | Loaded | Began | Text | Noticed | Finished | Failed | Died
_EVENTS = {
    "loading": Loading,
    "loaded": Loaded,
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
        self.command = list(command or python_command("tinychat.worker"))
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task | None = None
        self._replies: dict[int, asyncio.Future] = {}
        self._asked = 0
        self._ending = False
        self._complaints: Any = None

    @property
    def pid(self) -> int | None:
        """The process, while it lives."""
        p = self._process
        return p.pid if p is not None and p.returncode is None else None

    async def start(self) -> None:
        """Start the process; after a death, a new one."""
        self._ending = False
        if self._complaints is not None:
            self._complaints.close()
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._complaints,
            limit=LINE_LIMIT,
            start_new_session=True,  # the terminal's Ctrl+C and Ctrl+Z are not for it
        )
        self._reader = asyncio.create_task(self._read(self._process))

    def load(self, model: str, options: dict[str, Any]) -> None:
        """Load a model in place of the present one. → Loading…, then Loaded or Failed."""
        self._send(op="load", model=model, options=options)

    def answer(self, chat: str, path: list[dict], system: str | None, params: dict[str, Any]) -> None:
        """Answer the user message at the end of `path`. → Began, Text…, then Finished or Failed."""
        self._send(op="answer", chat=chat, path=path, system=system, params=params)

    def cancel(self) -> None:
        """Stop the running answer; its Finished says "cancelled"."""
        self._send(op="cancel")

    async def count(self, text: str) -> int | None:
        """Tokens of a text; None while no model is loaded."""
        return await self._ask(op="count", text=text)

    async def models(self) -> dict[str, Any] | None:
        """What `tinychat.worker.list_models` tells."""
        return await self._ask(op="models")

    async def limits(self) -> dict[str, float] | None:
        """weight_bytes_per_token and read_bandwidth_gb_s; None while they cannot be measured."""
        return await self._ask(op="limits")

    async def close(self) -> None:
        """End the process: politely, then not. Idempotent."""
        self._ending = True
        p = self._process
        if p is None:
            return
        with suppress(OSError, RuntimeError):
            p.stdin.close()
        try:
            await asyncio.wait_for(p.wait(), PATIENCE)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                p.kill()
            await p.wait()
        if self._reader is not None:
            self._reader.cancel()

    def _send(self, **request: Any) -> bool:
        p = self._process
        if p is None or p.returncode is not None or p.stdin.is_closing():
            return False
        p.stdin.write(json.dumps(request).encode() + b"\n")
        return True

    async def _ask(self, **request: Any) -> Any:
        self._asked += 1
        future = asyncio.get_running_loop().create_future()
        self._replies[self._asked] = future
        if not self._send(id=self._asked, **request):
            return None
        return await future

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        try:
            async for line in process.stdout:
                event = json.loads(line)
                kind = event.pop("ev")
                if kind == "reply":
                    future = self._replies.pop(event["id"], None)
                    if future is not None and not future.done():
                        future.set_result(event["value"])
                else:
                    self.on_event(_EVENTS[kind](**event))
        except ValueError as e:  # a line that is not ours, or far too long
            process.kill()
            reason = f"it said something unintelligible ({e})"
        else:
            reason = ""
        code = await process.wait()
        for future in self._replies.values():
            if not future.done():
                future.set_result(None)
        self._replies.clear()
        if not self._ending:
            self.on_event(Died(reason or self._why(code)))

    def _why(self, code: int) -> str:
        if code == -signal.SIGKILL:
            return "it was killed (signal 9; the system does that when memory runs out)"
        if code < 0:
            with suppress(ValueError):
                return f"it crashed ({signal.Signals(-code).name})"
            return f"it crashed (signal {-code})"
        self._complaints.seek(0, 2)
        self._complaints.seek(max(0, self._complaints.tell() - 4000))
        said = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        return f"it ended with code {code}" + (f": {said[-1][:200]}" if said else "")
