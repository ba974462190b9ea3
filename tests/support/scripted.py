"""A scripted engine, and waiting for conditions instead of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tinychat.conversation import Message
from tinychat.process.protocol import Answer, Began, Calling, Died, Failed, Finished, Loaded, Text

FACTS = {
    "model": "demo",
    "backend": "cpu",
    "isa": "avx2",
    "ctx": 4096,
    "act_bits": 8,
    "kv_bits": 16,
    "threads": 2,
}


@dataclass
class Script:
    """One answer: what it says, in which pieces, and how it ends."""

    text: str = "Hello."
    pieces: int = 5
    reason: str = "stop"
    hang: bool = False  # after the last piece, until cancelled
    waits: bool = False  # before the first piece, until told to go on (cancelled)
    deaf: bool = False  # to that, too
    prompt_text: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    calls: tuple[tuple[str, str], ...] = ()  # (name, arguments as JSON) of tools


def known(name: str, size: int, rate: float, good_for: str = "", why_not: str = "", **more) -> dict:
    """A model as the engine tells of it."""
    memory = int(size * 1.15) + 300_000_000
    facts = {"name": name, "size": size, "memory": memory, "rate": rate, "why_not": why_not}
    return facts | {"good_for": good_for, "license": "apache-2.0", "held": 0, "demo": False} | more


def listed(installed: bool = True) -> dict:
    """A small machine, with models or without."""
    here = [
        known("demo", 94_000_000, 85.1, "the demo; knows little", quantization="Q4_1", path="/m/demo"),
        known(
            "huge", 94_000_000_000, 0.085, why_not="more than 4.0 GB memory", quantization="Q4_0", path="/m/h"
        ),
    ]
    available = [
        known("smollm2-135m", 94_000_000, 85.1, "the demo; knows little", demo=True),
        known("small", 639_000_000, 12.5, "short, simple tasks"),
        known("other", 810_000_000, 9.9, "summaries, rewriting", license="llama3.2", held=300_000_000),
        known("better", 990_000_000, 8.1, "code, maths, long texts"),
        known("too-large", 18_600_000_000, 3.9, "code, knowledge; quick", "more than 4.0 GB memory"),
    ]
    offered = [] if installed else ["better", "other", "small", "smollm2-135m"]
    machine = {"memory": 4_000_000_000, "disk": 45_000_000_000, "bandwidth": 8.0, "offline": False}
    said = {"installed": here if installed else [], "available": available, "offered": offered}
    return said | {"cached": []} | machine


class ScriptedEngine:
    """A ChatEngine of the test's own. Answers come from `scripts`, then "Hello." for ever."""

    def __init__(self, scripts: Iterable[Script | str] = (), loads: bool = True):
        self.scripts = [Script(s) if isinstance(s, str) else s for s in scripts]
        self.on_event: Callable[[Any], None] = lambda event: None
        self.loads = loads
        self.broken: set[str] = set()  # models that do not load
        self.facts: dict[str, Any] = {}  # that differ from FACTS
        self.listed: dict | None = listed()
        self.requests: list[Answer] = []
        self.loaded: list[str] = []
        self.starts = self.hurried = 0
        self.pid: int | None = None
        self.cancelled = asyncio.Event()
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        self.starts += 1
        if self._task is not None:
            self._task.cancel()
        self.pid = 1 << 30  # nobody's

    def load(self, model: str, options: dict) -> None:
        self.loaded.append(model)
        if model in self.broken:
            self.on_event(Failed(f"There is no model {model}.", "Choose another.", "load"))
        elif self.loads:
            self.on_event(Loaded({**FACTS, **self.facts, "model": model}, {"temperature": 0.7}))

    def answer(self, chat, path: list[Message], system: str | None, params: dict, tools=()) -> None:
        self.requests.append(Answer(chat, path, system, params, list(tools)))
        script = self.scripts.pop(0) if self.scripts else Script()
        self.cancelled.clear()
        before = path[-1] if path and path[-1].role == "assistant" else Message("assistant", "")
        self._task = asyncio.create_task(self._say(script, before))

    async def _say(self, s: Script, before: Message) -> None:
        if s.waits:
            await self.cancelled.wait()
        self.on_event(Began(s.prompt_text, 10))
        size = max(1, -(-len(s.text) // s.pieces))
        said, thought = "", None
        for i in range(0, len(s.text), size):
            said += s.text[i : i + size]
            if thought is None and "</think>" in said:
                thought = len(said.split())
            self.on_event(Text(s.text[i : i + size], len(said.split()), thought))
            await asyncio.sleep(0)
        reason = s.reason
        if s.hang:
            await self.cancelled.wait()
            while s.deaf:
                await asyncio.sleep(1)
            reason = "cancelled"
        n = len(said.split())
        stats = {"prompt_tokens": 10, "generated_tokens": n, "decode_tps": 20.0, "ttft_s": 0.25, **s.stats}
        ids = [*before.ids, *range(n)]
        answer = Message("assistant", before.content + said, None, s.prompt_text, [1, 2], ids, reason)
        for i, (name, arguments) in enumerate(s.calls):
            self.on_event(Calling(i, name))
            call = {"id": f"call{len(self.requests)}{i}", "type": "function"}
            answer.tool_calls.append({**call, "function": {"name": name, "arguments": arguments}})
            answer.finish_reason = "tool_calls"
        answer.stats = {"reasoning_tokens": thought or 0, **stats}
        self.on_event(Finished(answer))

    def end_thought(self) -> None:
        self.hurried += 1

    def cancel(self) -> None:
        self.cancelled.set()

    def die(self, reason: str = "it was killed") -> None:
        """As a killed process looks from here."""
        if self._task is not None:
            self._task.cancel()
        self.pid = None
        self.on_event(Died(reason))

    async def count(self, text: str) -> int | None:
        return len(text.split())

    async def head(self, text: str, tokens: int) -> str | None:
        return " ".join(text.split()[:tokens])

    async def models(self) -> dict | None:
        return self.listed

    async def limits(self) -> dict | None:
        return {"weight_bytes_per_token": 100_000_000, "read_bandwidth_gb_s": 8.0}

    async def close(self) -> None:
        self.pid = None


async def wait_until(pilot, predicate: Callable[[], Any], seconds: float = 10.0) -> None:
    """Let the app run until `predicate` holds."""
    until = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > until:
            raise AssertionError(f"never came true; the screen:\n{screen_text(pilot.app)}")
        await pilot.pause(0.01)


def screen_text(app) -> str:
    """What is on the screen, as text."""
    lines = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)
