"""The engine as a child process: JSON lines on stdin and stdout (`python -m tinychat.process.worker`).

Whoever starts it talks to it through `tinychat.process.client`. Requests, one object a line:

    {"op": "load", "model": NAME, "options": {…}}       what `tinychat.load` takes
    {"op": "answer", "chat": KEY, "path": [message …], "system": TEXT|null, "params": {…}}
                                                        the path ends with what the user said
    {"op": "cancel"}                                    felt between two steps or prefill chunks
    {"op": "count", "id": N, "text": TEXT}              → reply: tokens
    {"op": "head", "id": N, "text": TEXT, "tokens": M}  → reply: the beginning of it, of at most M tokens
    {"op": "models", "id": N}                           → reply: what is installed, and what can be pulled
    {"op": "limits", "id": N}                           → reply: bytes of weights a token, memory bandwidth

Events, one object a line: loading, loaded, reading, began, text (batched), notice, done, failed, reply. When
stdin closes (the parent is gone, however it went) the process saves the KV caches of its chats, if nothing is
being answered, and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from tinychat.base.events import TextDelta

BATCH_SECONDS = 0.05
IDLE_SECONDS = 15.0  # after an answer, until the KV cache is saved
LAST_SECONDS = 1.5  # that saving may take when the parent is gone
KEPT_SESSIONS = 4
# The engine fills every core, and the screen must wake up among its threads: so it waits half as long for one
# (key to paint p95 43 → 31 ms, p99 58 → 48; `benchmarks/tui_latency.py --only keys`). Alone it is as fast.
NICENESS = 3

Load = Callable[[str, dict[str, Any], Callable[[str, int, int], None]], Any]


class Worker:
    """Reads requests from `source`, writes events to `sink`. `load(name, options, progress)` gives a
    Model.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO, load: Load):
        self.source, self.sink, self.load = source, sink, load
        self.model: Any = None
        self.sessions: OrderedDict[str, Any] = OrderedDict()
        self.answering: Any = None
        self.limits: dict[str, float] | None = None
        self.unsaved: set[str] = set()  # chats whose KV cache on disk is older than the one here
        self.keeps = True  # KV caches on disk
        self.cancelled = threading.Event()
        self.requests: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.questions: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.write_lock = threading.Lock()

    def run(self) -> None:
        """Serve until the parent is gone; does not return."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._answer_questions, daemon=True).start()
        while True:
            try:
                request = self.requests.get(timeout=IDLE_SECONDS if self.unsaved else None)
            except queue.Empty:
                self._save()
                continue
            handle = {"load": self._load, "answer": self._answer}[request["op"]]
            try:
                handle(request)
            except BaseException as e:
                self._fail(e, request["op"])
                if isinstance(e, MemoryError):
                    self.sessions.clear()

    def _read(self) -> None:
        for line in self.source:
            request = json.loads(line)
            op = request["op"]
            if op == "cancel":
                # Set first: an answer that is about to begin looks at the flag.
                self.cancelled.set()
                if (session := self.answering) is not None:
                    session.cancel()
            elif op in ("count", "head", "models", "limits"):
                self.questions.put(request)
            else:
                if op == "answer":
                    self.cancelled.clear()
                self.requests.put(request)
        if self.answering is None and self.unsaved:
            last = threading.Thread(target=self._save, daemon=True)
            last.start()
            last.join(LAST_SECONDS)
        os._exit(0)

    def _save(self) -> None:
        """Keep the KV caches of the chats that were spoken in, so that they go on at once when resumed."""
        from tinychat.base import locations

        while self.unsaved:
            key = self.unsaved.pop()
            if self.keeps and key in self.sessions and key.isdecimal():
                with suppress(Exception):  # it only saves time; the conversation itself is safe
                    self.sessions[key].save_kv(locations.kv_file(key))

    def _send(self, **event: Any) -> None:
        data = json.dumps(event).encode() + b"\n"
        with self.write_lock:
            try:
                self.sink.write(data)
                self.sink.flush()
            except OSError:
                os._exit(0)

    def _fail(self, e: BaseException, during: str) -> None:
        from tinychat.base import errors

        # A new process may have a lost device again; these last words are the reason. What does not load here
        # would not load there either.
        if isinstance(e, errors.DeviceLostError) and during != "load":
            print(e.what, file=sys.stderr, flush=True)
            os._exit(1)
        if os.environ.get("TINYCHAT_DEBUG"):
            import traceback

            traceback.print_exception(e)
        error = errors.of(e)
        self._send(ev="failed", what=error.what, todo=error.todo, during=during)

    def _load(self, request: dict) -> None:
        if self.model is not None:
            self._save()
            self.sessions.clear()
            self.model.close()
            self.model = self.limits = None
        last = 0.0

        def progress(what: str, done: int = 0, total: int = 0) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= 0.1 or done == total:
                last = now
                self._send(ev="loading", what=what, done=done, total=total)

        options = dict(request["options"])
        self.keeps = options.pop("keep_kv", True)
        self.model = self.load(request["model"], options, progress)
        defaults = getattr(self.model, "default_sampling", None)
        self._send(
            ev="loaded",
            facts=self.model.describe(),
            sampling=vars(defaults).copy() if defaults is not None else {},
            has_template=self.model.template is not None,
        )

    def _answer(self, request: dict) -> None:
        from tinychat.base.errors import UsageError

        if self.model is None:
            raise UsageError("No model is loaded.", "Choose one: /model.")
        session = self._session(request)
        self.answering = session
        try:
            self._stream(session, session.regenerate())
        finally:
            self.answering = None
            self.unsaved.add(request["chat"])

    def _session(self, request: dict) -> Any:
        from tinychat.session import Message

        key = request["chat"]
        session = self.sessions.pop(key, None)
        if session is None:
            session = self.model.session(request["system"])
            if self.keeps and key.isdecimal():
                from tinychat.base import locations

                session.load_kv(locations.kv_file(key))
        if len(self.sessions) >= KEPT_SESSIONS:
            self._save()
        self.sessions[key] = session
        while len(self.sessions) > KEPT_SESSIONS:
            self.sessions.popitem(last=False)
        session.system = request["system"]
        session.params = self.model.default_sampling.but(**request["params"])
        session.nodes = [
            Message(parent=i - 1 if i else None, **fields) for i, fields in enumerate(request["path"])
        ]
        session.leaf = len(session.nodes) - 1
        return session

    def _stream(self, session: Any, events: Any) -> None:
        from tinychat.base.events import Done, Notice, Reading

        began = False
        batch = _Batch(self._send)
        try:
            for event in events:
                if self.cancelled.is_set():
                    session.cancel()
                if isinstance(event, Reading):
                    self._send(ev="reading", tokens=event.tokens, total=event.total, rate=event.rate)
                    continue
                if isinstance(event, Notice):
                    self._send(ev="notice", message=event.message)
                    continue
                if not began:
                    began = True
                    # Its end says whether the template itself opened a thought.
                    start = session.nodes[session.leaf].prompt_text[-200:]
                    read = sum(len(n.prompt_ids) + len(n.ids) for n in session.nodes)
                    self._send(ev="began", prompt_text=start, prompt_tokens=read)
                if not isinstance(event, Done):
                    batch.add(event)
                else:
                    batch.close()
                    node = session.nodes[session.leaf]
                    self._send(
                        ev="done",
                        content=node.content,
                        ids=node.ids,
                        prompt_ids=node.prompt_ids,
                        prompt_text=node.prompt_text,
                        finish_reason=event.finish_reason,
                        stats=event.stats.as_dict(),
                        thought=event.stats.reasoning_tokens or None,
                    )
        finally:
            batch.close()

    # Questions are answered beside a running answer

    def _answer_questions(self) -> None:
        while True:
            request = self.questions.get()
            value = None
            with suppress(Exception):  # the asker shows that it is not known
                if request["op"] == "count":
                    value = self._count(request["text"])
                elif request["op"] == "head":
                    value = self._head(request["text"], request["tokens"])
                else:
                    value = list_models() if request["op"] == "models" else self._limits()
            self._send(ev="reply", id=request["id"], value=value)

    def _count(self, text: str) -> int | None:
        return None if self.model is None else len(self.model.tokenizer.encode(text))

    def _head(self, text: str, tokens: int) -> str | None:
        """The longest beginning, nearly, that has at most that many tokens; it ends with a line or a word."""
        n = self._count(text)
        if n is None:
            return None
        while n > tokens:
            text = text[: min(len(text) - 1, int(len(text) * tokens / n * 0.99))]
            cut = max(text.rfind("\n"), text.rfind(" "))
            text = text[:cut] if cut > len(text) // 2 else text
            n = self._count(text)
        return text

    def _limits(self) -> dict[str, float] | None:
        """Measured once a model, and never beside an answer: both would be wrong."""
        if self.model is None or self.answering is not None:
            return None
        if self.limits is None:
            from tinychat.base.machine import cpu_count
            from tinychat.bench import weight_bytes_per_token
            from tinychat.kernels_cpu import _native

            self.limits = {
                "weight_bytes_per_token": weight_bytes_per_token(self.model.checkpoint, self.model.policy),
                "read_bandwidth_gb_s": _native.read_bandwidth(cpu_count(), 1 << 28),
            }
        return self.limits


class _Batch:
    """Gathers tokens and sends them together, BATCH_SECONDS after the first one at the latest."""

    def __init__(self, send: Callable[..., None]):
        self.send = send
        self.tokens = 0
        self.thought: int | None = None  # tokens before the answer, where there is reasoning
        self._thinking = False
        self._pieces: list[str] = []
        self._sent = 0
        self._last = 0.0
        self._lock = threading.Lock()
        self._waiting = threading.Event()
        self._closed = False
        threading.Thread(target=self._flush_late, daemon=True).start()

    def add(self, delta: TextDelta) -> None:
        """One more token, or text that was held back."""
        with self._lock:
            if self._thinking and delta.text and self.thought is None:
                self.thought = self.tokens
            self._thinking |= bool(delta.reasoning)
            self.tokens += delta.token_id is not None
            self._pieces.append(delta.written)
            if time.monotonic() - self._last >= BATCH_SECONDS:
                self._flush()
            else:
                self._waiting.set()

    def close(self) -> None:
        """Send what is left."""
        with self._lock:
            self._flush()
            self._closed = True
        self._waiting.set()

    def _flush(self) -> None:
        text = "".join(self._pieces)
        if text or self.tokens > self._sent:
            self.send(ev="text", text=text, tokens=self.tokens, thought=self.thought)
        self._pieces.clear()
        self._sent, self._last = self.tokens, time.monotonic()

    def _flush_late(self) -> None:
        # The next token may be a long time coming, and the process may be killed before it does.
        while not self._closed:
            self._waiting.wait()
            self._waiting.clear()
            time.sleep(BATCH_SECONDS)
            with self._lock:
                if self._pieces:
                    self._flush()


def list_models() -> dict[str, Any]:
    """What is installed (name, size in bytes, quantization) and what can be pulled; bytes of memory free."""
    from tinychat.base.machine import available_memory
    from tinychat.hub import store

    installed = [
        {"name": m.name, "size": m.size, "quantization": m.quantization or "", "path": str(m.path)}
        for m in store.installed()
    ]
    have = {m["name"] for m in installed}
    return {
        "installed": installed,
        "available": [name for name in store.known_names() if name not in have],
        "memory": available_memory(),
    }


def load_model(name: str, options: dict[str, Any], progress: Callable[[str, int, int], None]) -> Any:
    """A Model, downloaded first if need be."""
    progress("Starting the engine", 0, 0)
    from tinychat.hub import transfer
    from tinychat.loading import load

    transfer.listener = lambda label, done, total: progress(f"Downloading {label}", done, total)
    progress(f"Loading {name}", 0, 0)
    return load(name, **options, progress=lambda what: progress(what, 0, 0))


def serve(load: Load = load_model) -> None:
    """Talk on stdin and stdout; does not return. What the engine prints goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Neither the engine nor a library may write between our lines, or wait for input.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    Worker(source, sink, load).run()


if __name__ == "__main__":
    serve()
