"""How smooth the chat screen is while the model decodes.

    python benchmarks/tui_latency.py [MODEL] [--only PART]...     (default: smollm2-135m, everything; minutes)

Parts, each with the bound that the screen is built to:

- start: from the command to the first picture (0.4 s) and to the finished screen
- keys: keypress to paint while an answer streams on all cores: p95 (50 ms), p99 (100 ms)
- speed: decode speed under the screen, as a share of a one-shot command's (0.93); both in turn, the median
- idle: CPU of the idle screen and its engine (1 %)
- stream: the longest time that the event loop is blocked while a 20,000-token answer streams in: one code
  fence, one list, one table, and prose (100 ms)
- stored: with 1,000 stored chats, opening one of 500 messages (0.5 s) and searching in all of them (0.1 s)

Run it on an otherwise idle machine: another program's load shows in every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import re
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
KEYS = 200
TINYCHAT = [sys.executable, "-m", "tinychat"]


# The first word of the status line, alone in its style.
_STATE = re.compile(rb"m(starting|ready|reading|answering|stopping)\x1b\[0m")


class Screen:
    """`tinychat run` in a pseudo-terminal. `state`: what its status line says."""

    def __init__(self, *arguments: str, home: str):
        self.began = time.perf_counter()
        self.state, self._tail = "", b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", TINYCHAT_HOME=home)
            os.execv(TINYCHAT[0], [*TINYCHAT, *arguments])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def _more(self, seconds: float) -> bytes:
        """What is painted within that time, as soon as it is; and the end of what was painted before."""
        if not select.select([self.fd], [], [], max(0.0, seconds))[0]:
            return b""
        seen = self._tail + os.read(self.fd, 1 << 16)
        self._tail = seen[-200:]
        if states := _STATE.findall(seen):
            self.state = states[-1].decode()
        return seen

    def read(self, until: str, seconds: float = 60) -> float:
        """Wait until that text is painted; the time it took from now."""
        began, wanted = time.perf_counter(), until.encode()
        self._tail = b""
        while (left := began + seconds - time.perf_counter()) > 0:
            if wanted in self._more(left):
                return time.perf_counter() - began
        raise SystemExit(f"{until!r} was never painted; the screen is {self.state}")

    def wait(self, *states: str, seconds: float = 120) -> None:
        """Until the status line says one of these."""
        until = time.perf_counter() + seconds
        while self.state not in states:
            if (left := until - time.perf_counter()) <= 0:
                raise SystemExit(f"never {' or '.join(states)}, but {self.state}")
            self._more(left)

    def drain(self, seconds: float) -> None:
        """Let it paint for a while."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self._more(left)

    def ask(self, text: str) -> None:
        """Type and send a message, or press a key that has one answered; until the answer comes."""
        self.wait("ready")
        self.write(text)
        if text.isprintable():
            self.drain(0.5)
            self.write("\r")
        self.wait("answering")

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


def keys(model: str, home: str) -> dict:
    """Type letters that no answer has, while one streams."""
    s = Screen("run", model, "--temp", "0", "--draft", "none", "--max-tokens", "2000", home=home)
    s.ask(PROMPT)
    latencies: list[float] = []
    for i in range(10 * KEYS):
        letter = chr(0x4E00 + i)
        if s.state != "answering":
            s.ask("\x12")  # ctrl+r: the same again
        s.write(letter)
        took = s.read(letter)
        if s.state == "answering":  # then it was all the while
            latencies.append(took)
        if len(latencies) == KEYS:
            break
        s.drain(0.03 + 0.04 * ((i * 7919) % 100) / 100)
    s.close()
    latencies.sort()
    return {
        "keys": len(latencies),
        "key_p50_ms": 1000 * latencies[len(latencies) // 2],
        "key_p95_ms": 1000 * latencies[int(len(latencies) * 0.95)],
        "key_p99_ms": 1000 * latencies[int(len(latencies) * 0.99)],
        "key_worst_ms": 1000 * latencies[-1],
    }


def speed(model: str, home: str) -> dict:
    """The same answer in the screen, alone, and alone with the eviction policy of a conversation, in turn.

    One answer alone keeps no scores for an eviction to come; a conversation does, in the screen or not.
    """
    from tinychat.chats.chat_store import ChatStore

    flags = ["--temp", "0", "--max-tokens", str(TOKENS), "--draft", "none"]

    def one_shot(*more: str) -> float:
        done = subprocess.run(
            [*TINYCHAT, "run", model, PROMPT, "--json", *flags, *more], capture_output=True, text=True,
            check=True, env={**os.environ, "TINYCHAT_HOME": home}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(done.stdout)["stats"]["decode_tps"]

    s = Screen("run", model, *flags, home=home)
    alone, same, under = [], [], []
    for turn in range(7):
        s.ask("\x12" if turn else PROMPT)
        s.wait("ready")
        s.drain(0.5)
        store = ChatStore(Path(home) / "chats.db")
        under.append(store.messages(store.latest().id)[-1].stats["decode_tps"])
        store.close()
        alone.append(one_shot())
        same.append(one_shot("--kv-policy", "h2o"))
    s.close()
    return {
        "under_screen_tok_s": statistics.median(under),
        "alone_tok_s": statistics.median(alone),
        "share": statistics.median(u / a for u, a in zip(under, alone, strict=True)),
        "alone_with_scores_tok_s": statistics.median(same),
        "share_with_scores": statistics.median(u / a for u, a in zip(under, same, strict=True)),
    }


def idle(model: str, home: str) -> dict:
    """After an answer, when nothing happens any more."""
    s = Screen("run", model, "--max-tokens", str(TOKENS), home=home)
    s.ask(PROMPT)
    s.wait("ready")
    s.drain(20)  # the KV cache is kept after 15 s
    before = s.cpu()
    s.drain(15)
    share = (s.cpu() - before) / 15
    s.close()
    return {"idle_cpu": share}


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
    from tinychat.chats.chat_store import ChatStore
    from tinychat.conversation import Message
    from tinychat.process.protocol import Began, Finished, Loaded, Text
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
        engine.on_event(Finished(Message("assistant", text, None, "", [], list(range(20000)), "stop", stats)))
        while app.chat.answering:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        took = time.perf_counter() - began
        watch.cancel()
    store.close()
    folder.cleanup()
    return worst, took


def fill_store(home: str) -> None:
    """1,000 chats of 20 messages; the newest one has 500."""
    from tinychat.chats.chat_store import ChatStore

    store = ChatStore(Path(home) / "chats.db")
    now = time.time()
    chats, messages = [], []
    for c in range(1000):
        for i in range(500 if c == 999 else 20):
            text = (
                f"message {i} of {c} about a {'quagga' if c == 42 else 'river'}. "
                + "Some *words* on it. " * 12
            )
            if i % 4 == 1:
                text += "\n\n```python\nfor i in range(10):\n    print(i)\n```\n\n- one\n- two\n"
            role, end = ("assistant", "stop") if i % 2 else ("user", None)
            parent = len(messages) if i else None
            messages.append((len(messages) + 1, c + 1, parent, role, text, end, now))
        chats.append((c + 1, f"title {c:04}", "demo", "{}", len(messages), now, now - 1000 + c))

    def fill(db) -> None:
        db.executemany(
            "INSERT INTO chats (id, title, model, params, leaf, created, updated)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            chats,
        )
        db.executemany(
            "INSERT INTO messages (id, chat, parent, role, content, finish_reason, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            messages,
        )
        db.execute("INSERT INTO words (rowid, content) SELECT id, content FROM messages")

    store._database.change(fill)
    store.close()


def stored(model: str) -> dict:
    """Lists, searches and opens in a screen with many chats; each the slowest of five times."""
    from tinychat.base import locations

    lists, rare, common, opened = [], [], [], []
    with tempfile.TemporaryDirectory() as home:
        for entry in locations.home().iterdir() if not Path(model).exists() else ():
            if entry.is_dir() and entry.name != "locks":
                (Path(home) / entry.name).symlink_to(entry)  # the model, not the chats
        fill_store(home)
        for _ in range(5):
            s = Screen("run", model, home=home)
            s.wait("ready")
            s.drain(1)
            s.write("\x02")  # ctrl+b
            lists.append(s.read("title 0999"))
            s.drain(0.5)
            s.write("q")
            rare.append(s.read("title 0042"))
            s.drain(0.5)
            s.write("\x7f")
            s.read("title 0999")
            s.drain(0.5)
            s.write("a")
            common.append(s.read("of 999"))
            s.drain(0.5)
            s.write("\x7f")
            s.read("title 0999")
            s.drain(0.5)
            s.write("\r")
            opened.append(s.read("message 498 of 999"))
            s.close()
    return {
        "list_1000_chats_s": max(lists),
        "search_rare_s": max(rare),
        "search_common_s": max(common),
        "open_500_messages_s": max(opened),
    }


def stream() -> dict:
    """See `blocked`."""
    results = {}
    for kind, text in LONG.items():
        worst, took = asyncio.run(blocked(text))
        results |= {f"blocked_{kind}_ms": 1000 * worst, f"{kind}_s": took}
    return results


def main() -> None:
    parts = ("start", "keys", "speed", "idle", "stream", "stored")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--only", action="append", choices=parts, help="this part; may be repeated")
    arguments = parser.parse_args()
    model, wanted = arguments.model, arguments.only or parts
    results: dict = {"model": model}
    with tempfile.TemporaryDirectory() as home:
        if not Path(model).exists():
            home = os.environ.get("TINYCHAT_HOME", home)
        for part, measure in {"start": first_paint, "keys": keys, "speed": speed, "idle": idle}.items():
            if part in wanted:
                results |= measure(model, home)
    if "stream" in wanted:
        results |= stream()
    if "stored" in wanted:
        results |= stored(model)
    results["load_average"] = os.getloadavg()[0]
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in results.items()}, indent=1))


if __name__ == "__main__":
    main()
