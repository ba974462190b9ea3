"""How smooth the chat screen is while the model decodes.

    python benchmarks/tui_latency.py [MODEL]        (default: smollm2-135m; some minutes)

Measures, each with the bound that the screen is built to:

- first paint: from the command to the first picture (0.4 s) and to the finished screen
- keypress to paint while an answer streams on all cores: p95 (50 ms), p99 (100 ms)
- decode speed under the screen, as a share of a one-shot command's (0.93)
- CPU of the idle screen and its engine (1 %)
- the longest time that the event loop is blocked while a 20,000-token answer streams in: one code fence, one
  list, one table, and prose (100 ms)
- opening a chat of 500 messages (0.5 s)

Run it on an otherwise idle machine: another program's load shows in every figure.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

PROMPT = "Write a long story about a fox, a river and a mill. Take your time and describe everything."
TOKENS = 300
TINYCHAT = [sys.executable, "-m", "tinychat"]


class Screen:
    """`tinychat run` in a pseudo-terminal."""

    def __init__(self, *arguments: str, home: str):
        self.began = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", TINYCHAT_HOME=home)
            os.execv(TINYCHAT[0], [*TINYCHAT, *arguments])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def read(self, until: str, seconds: float = 300) -> float:
        """Read what is painted until that text is among it; the time it took from now."""
        began, seen = time.perf_counter(), b""
        wanted = until.encode()
        while time.perf_counter() - began < seconds:
            if select.select([self.fd], [], [], 0.2)[0]:
                seen = seen[-200:] + os.read(self.fd, 1 << 16)
                if wanted in seen:
                    return time.perf_counter() - began
        raise SystemExit(f"{until!r} was never painted")

    def drain(self, seconds: float) -> None:
        """Read and forget."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                os.read(self.fd, 1 << 16)

    def write(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def cpu(self) -> float:
        """CPU seconds of the screen and the engine so far."""
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in processes)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        while True:
            try:
                if not os.read(self.fd, 1 << 16):
                    break
            except OSError:
                break
        os.waitpid(self.pid, 0)


def first_paint(model: str, home: str) -> dict:
    frames, screens = [], []
    for _ in range(7):
        s = Screen("run", model, home=home)
        s.read("╭")
        frames.append(time.perf_counter() - s.began)
        s.read("f1")
        screens.append(time.perf_counter() - s.began)
        s.close()
    return {"first_paint_s": statistics.median(frames), "screen_s": statistics.median(screens)}


def typing(model: str, home: str) -> dict:
    """Type letters that no answer has, while one streams; then the answer's speed, then silence."""
    flags = ["--temp", "0", "--max-tokens", str(TOKENS), "--draft", "none"]
    alone = []
    for _ in range(3):
        done = subprocess.run(
            [*TINYCHAT, "run", model, PROMPT, "--json", *flags], capture_output=True, text=True, check=True,
            env={**os.environ, "TINYCHAT_HOME": home}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        alone.append(json.loads(done.stdout)["stats"]["decode_tps"])

    from tinychat.store import ChatStore

    s = Screen("run", model, *flags, home=home)
    s.read("ready")
    s.drain(2)
    under, latencies, letter = [], [], 0x4E00
    for turn in range(4):
        s.write(PROMPT if not turn else "\x12")  # ctrl+r: the same again
        if not turn:
            s.drain(0.5)
            s.write("\r")
        s.read("●")
        if turn == 3:  # the last answer is typed into, the others are not disturbed
            until = time.perf_counter() + 4
            while time.perf_counter() < until:
                letter += 1
                s.write(chr(letter))
                latencies.append(s.read(chr(letter)))
                s.drain(0.03 + 0.04 * ((letter * 7919) % 100) / 100)
        s.read("ready")
        if turn < 3:
            store = ChatStore(Path(home) / "chats.db")
            under.append(store.messages(store.latest().id)[-1].stats["decode_tps"])
            store.close()
        s.drain(1)
    s.drain(3)
    before = s.cpu()
    s.drain(10)
    idle = (s.cpu() - before) / 10
    s.close()
    latencies.sort()
    return {
        "keys": len(latencies),
        "key_p50_ms": 1000 * latencies[len(latencies) // 2],
        "key_p95_ms": 1000 * latencies[int(len(latencies) * 0.95)],
        "key_p99_ms": 1000 * latencies[int(len(latencies) * 0.99)],
        "alone_tok_s": max(alone),
        "under_screen_tok_s": max(under),
        "share": max(under) / max(alone),
        "idle_cpu": idle,
    }


LONG = {
    "fence": "```python\n" + "def name(x):\n    return x + 1  # why not\n\n" * 2500,
    "list": "".join(f"{i}. an item with **bold** words and some more of them\n" for i in range(1, 1800)),
    "table": "| a | b | c |\n|---|---|---|\n" + "| one cell | another | 12345 |\n" * 3000,
    "prose": ("Some words of *prose* that go on for quite a while. " * 8 + "\n\n") * 250,
}


async def blocked(text: str) -> tuple[float, float]:
    """Stream `text` in 20,000 tokens through a headless screen; the longest pause of the event loop, and how
    long all of it took.
    """
    from tinychat.client import Began, Finished, Loaded, Text
    from tinychat.store import ChatStore
    from tinychat.tui.app import ChatApp
    from tinychat.tui.conversation import Conversation

    said = asyncio.Event()

    async def nothing(*_):
        return None

    def answer(*_):
        said.set()

    engine = SimpleNamespace(
        on_event=None, pid=None, start=nothing, close=nothing, count=nothing, models=nothing, limits=nothing,
        answer=answer, cancel=lambda: None, load=lambda *_: engine.on_event(Loaded({"ctx": 32768})),
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    store = ChatStore(Path(folder.name) / "chats.db")
    app = ChatApp("demo", Conversation(store, "demo"), engine=engine, settings=Path(folder.name) / "s.json")
    worst = 0.0

    async def probe() -> None:
        nonlocal worst
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, time.perf_counter() - began - 0.005)

    async with app.run_test(size=(120, 40)) as pilot:
        app.chat.composer.text = "go"
        await pilot.press("enter")
        await said.wait()
        await app.workers.wait_for_complete()  # parser and highlighter are loaded, as after any model's load
        watch = asyncio.create_task(probe())
        began = time.perf_counter()
        engine.on_event(Began(""))
        size = max(1, len(text) // 20000)
        batch = 16 * size  # 400 tok/s, 25 batches a second
        for i in range(0, len(text), batch):
            engine.on_event(Text(text[i : i + batch], i // size + 16))
            await asyncio.sleep(0.002)
        stats = {"generated_tokens": 20000, "decode_tps": 400.0}
        engine.on_event(Finished(text, list(range(20000)), [], "", "stop", stats))
        while app.chat.answering:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        took = time.perf_counter() - began
        watch.cancel()
    store.close()
    folder.cleanup()
    return worst, took


def long_chat(home: str) -> float:
    """Seconds from asking for a chat of 500 messages to seeing its end, in a running screen."""
    from tinychat.store import ChatStore
    from tinychat.tui.app import make_app

    store = ChatStore(Path(home) / "long.db")
    chat = store.create("demo")
    parent = None
    for i in range(500):
        text = f"message {i}\n\n" + "Some *words* with `code` in them. " * 12
        if i % 4 == 1:
            text += "\n\n```python\nfor i in range(10):\n    print(i)\n```\n\n- one\n- two\n"
        role = "assistant" if i % 2 else "user"
        m = store.add(chat.id, role, text, parent, "demo", finish_reason="stop" if i % 2 else None)
        parent = m.id

    async def measure() -> float:
        from tinychat.tui.messages import OpenChat

        app = make_app("demo", store, command=["sleep", "100"])
        async with app.run_test(size=(120, 40)) as pilot:
            await asyncio.sleep(1)
            began = time.perf_counter()
            app.chat.post_message(OpenChat(chat.id))
            while not any(t.message.id == parent for t in app.chat.transcript.turns):
                await asyncio.sleep(0.002)
            await pilot.pause()
            return time.perf_counter() - began

    return asyncio.run(measure())


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    results: dict = {"model": model}
    with tempfile.TemporaryDirectory() as home:
        if not Path(model).exists():
            home = os.environ.get("TINYCHAT_HOME", home)
        results |= first_paint(model, home)
        results |= typing(model, home)
        results["open_500_messages_s"] = long_chat(home)
    for kind, text in LONG.items():
        worst, took = asyncio.run(blocked(text))
        results[f"blocked_{kind}_ms"] = 1000 * worst
        results[f"{kind}_s"] = took
    results["load_average"] = os.getloadavg()[0]
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in results.items()}, indent=1))


if __name__ == "__main__":
    main()
