"""The engine behind the protocol: takes requests, tells events, holds the model and its chats' sessions."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tinychat.base import errors
from tinychat.base.errors import DeviceLostError, UsageError
from tinychat.base.events import Done, Event, Notice, Reading, TextDelta, ToolCallDelta
from tinychat.base.load_options import LoadOptions
from tinychat.conversation import Tree
from tinychat.process.protocol import (
    Answer,
    Began,
    Calling,
    Cancel,
    Count,
    EndThought,
    EngineEvent,
    Failed,
    Finished,
    Head,
    Limits,
    Load,
    Loaded,
    Loading,
    Models,
    Reply,
    Request,
    Text,
)

if TYPE_CHECKING:
    from tinychat.model import Model
    from tinychat.session import Session

BATCH_SECONDS = 0.05
IDLE_SECONDS = 15.0  # after an answer, until the KV cache is saved
KEPT_SESSIONS = 4
BEGINNING = 200  # characters of a prompt's end that say whether the template itself opened a thought

Loader = Callable[[str, dict[str, Any], Callable[[str, int, int], None]], "Model"]


class Core:
    """Requests come by `take`, from any thread; `tell` hears events and replies, from several threads.

    load: gives a Model for (name, options, progress). lost: hears why a device is lost in mid-answer, where
    only another process can have it back; without it that is told as any error.
    """

    def __init__(
        self,
        tell: Callable[[EngineEvent | Reply], None],
        load: Loader,
        lost: Callable[[str], None] | None = None,
    ):
        self.tell, self.load, self.lost = tell, load, lost
        self.model: Model | None = None
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.answering: Session | None = None
        self.limits: dict[str, float] | None = None
        self.bandwidth: float | None = None  # GB/s of the memory, roughly
        self.unsaved: set[str] = set()  # chats whose KV cache on disk is older than the one here
        self.keeps = True  # KV caches on disk
        self.cancelled = threading.Event()
        self.requests: queue.SimpleQueue[Load | Answer | None] = queue.SimpleQueue()
        self.questions: queue.SimpleQueue[Count | Head | Models | Limits | None] = queue.SimpleQueue()

    def take(self, request: Request) -> None:
        """Do what is asked, without waiting for it."""
        if isinstance(request, Cancel):
            # Set first: an answer that is about to begin looks at the flag.
            self.cancelled.set()
            if (session := self.answering) is not None:
                session.cancel()
        elif isinstance(request, EndThought):
            if (session := self.answering) is not None:
                session.end_thought()
        elif isinstance(request, (Load, Answer)):
            if isinstance(request, Answer):
                self.cancelled.clear()
            self.requests.put(request)
        else:
            self.questions.put(request)

    def end(self) -> None:
        """Let `run` return: after the running answer, which is stopped, and what was asked before."""
        self.take(Cancel())
        self.requests.put(None)

    def run(self) -> None:
        """Serve until `end`."""
        threading.Thread(target=self._answer_questions, daemon=True).start()
        while True:
            try:
                request = self.requests.get(timeout=IDLE_SECONDS if self.unsaved else None)
            except queue.Empty:
                self._save()
                continue
            if request is None:
                break
            try:
                self._load(request) if isinstance(request, Load) else self._answer(request)
            except BaseException as e:
                self._fail(e, "load" if isinstance(request, Load) else "answer")
                if isinstance(e, MemoryError):
                    self.sessions.clear()
        self.questions.put(None)
        self._unload()

    def save_if_idle(self) -> None:
        """Keep the KV caches, unless an answer is running."""
        if self.answering is None:
            self._save()

    def _save(self) -> None:
        """Keep the KV caches of the chats that were spoken in, so that they go on at once when resumed."""
        from tinychat.base import locations

        while self.unsaved:
            key = self.unsaved.pop()
            if self.keeps and key in self.sessions and key.isdecimal():
                with suppress(Exception):  # it only saves time; the conversation itself is safe
                    self.sessions[key].save_kv(locations.kv_file(key))

    def _fail(self, e: BaseException, during: str) -> None:
        # What does not load here would not load in another process either.
        if isinstance(e, DeviceLostError) and during != "load" and self.lost is not None:
            self.lost(e.what)
        if os.environ.get("TINYCHAT_DEBUG"):
            import traceback

            traceback.print_exception(e)
        error = errors.of(e)
        self.tell(Failed(error.what, error.todo, during))

    def _unload(self) -> None:
        if self.model is not None:
            self._save()
            self.sessions.clear()
            self.model.close()
            self.model = self.limits = None

    def _load(self, request: Load) -> None:
        self._unload()
        last = 0.0

        def progress(what: str, done: int = 0, total: int = 0) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= 0.1 or done == total:
                last = now
                self.tell(Loading(what, done, total))

        options = dict(request.options)
        self.keeps = options.pop("keep_kv", True)
        model = self.model = self.load(request.model, options, progress)
        sampling = vars(model.default_sampling).copy()
        templated = model.template is not None
        takes_tools = getattr(model, "takes_tools", templated)
        self.tell(Loaded(model.describe() | _ending(model), sampling, templated, request.model, takes_tools))

    def _answer(self, request: Answer) -> None:
        if self.model is None:
            raise UsageError("No model is loaded.", "Choose one: /model.")
        session = self._session(self.model, request)
        self.answering = session
        try:
            goes_on = request.path[-1:] and request.path[-1].role == "assistant"
            self._stream(session, session.go_on() if goes_on else session.regenerate())
        finally:
            self.answering = None
            self.unsaved.add(request.chat)

    def _session(self, model: Model, request: Answer) -> Session:
        key = request.chat
        session = self.sessions.pop(key, None)
        if session is None:
            session = model.session(request.system)
            if self.keeps and key.isdecimal():
                from tinychat.base import locations

                session.load_kv(locations.kv_file(key))
        if len(self.sessions) >= KEPT_SESSIONS:
            self._save()
        self.sessions[key] = session
        while len(self.sessions) > KEPT_SESSIONS:
            self.sessions.popitem(last=False)
        session.ends_circles = True
        session.system = request.system
        session.params = model.default_sampling.but(**request.params)
        session.tools = request.tools
        session.tree = Tree.of_path(request.path)
        return session

    def _stream(self, session: Session, events: Iterator[Event]) -> None:
        batch = _Batch(self.tell)
        began = False
        try:
            for event in events:
                if self.cancelled.is_set():
                    session.cancel()
                if isinstance(event, (Reading, Notice)):
                    self.tell(event)
                    continue
                if not began:
                    began = True
                    path = session.tree.messages()
                    read = sum(len(m.prompt_ids) + len(m.ids) for m in path)
                    self.tell(Began(path[-1].prompt_text[-BEGINNING:], read))
                if isinstance(event, Done):
                    batch.close()
                    self.tell(Finished(session.tree.messages()[-1]))
                elif isinstance(event, TextDelta):
                    batch.add(event)
                elif isinstance(event, ToolCallDelta) and event.name:
                    self.tell(Calling(event.index, event.name))
        finally:
            batch.close()

    # Questions are answered beside a running answer

    def _answer_questions(self) -> None:
        while (question := self.questions.get()) is not None:
            value: Any = None
            with suppress(Exception):  # the asker shows that it is not known
                if isinstance(question, Count):
                    value = self._count(question.text)
                elif isinstance(question, Head):
                    value = self._head(question.text, question.tokens)
                else:
                    value = self._models() if isinstance(question, Models) else self._limits()
            self.tell(Reply(question.id, value))

    def _models(self) -> dict[str, Any]:
        """The memory's speed is measured once, and never beside an answer: both would be wrong."""
        if self.bandwidth is None and self.answering is None:
            from tinychat.hub.fits import read_bandwidth

            self.bandwidth = read_bandwidth()
        return list_models(self.bandwidth)

    def _count(self, text: str) -> int | None:
        return None if self.model is None else len(self.model.tokenizer.encode(text))

    def _head(self, text: str, tokens: int) -> str | None:
        """The longest beginning, nearly, that has at most that many tokens; it ends with a line or a word."""
        n = self._count(text)
        while n is not None and n > tokens:
            text = text[: min(len(text) - 1, int(len(text) * tokens / n * 0.99))]
            cut = max(text.rfind("\n"), text.rfind(" "))
            text = text[:cut] if cut > len(text) // 2 else text
            n = self._count(text)
        return None if n is None else text

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

    def __init__(self, tell: Callable[[Text], None]):
        self.tell = tell
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
            self.tokens += delta.tokens
            self._pieces.append(delta.kept)
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
            self.tell(Text(text, self.tokens, self.thought))
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


def list_models(bandwidth: float | None = None) -> dict[str, Any]:
    """Models that are installed and that can be pulled, each with the fields of a `Fit` (those that are here
    also with quantization and path); names to begin with, where there are none yet, and those in another
    program's cache; bytes of memory and disk that are free, GB/s as given; whether tinychat is offline.
    """
    from tinychat.hub import fits, reach, store
    from tinychat.hub.installing import offline_by_environment

    machine = fits.Machine.here(bandwidth)
    installed = [
        {
            **fits.fit_of(m.name, m.size, machine, here=True).as_dict(),
            "quantization": m.quantization or "",
            "path": str(m.path),
        }
        for m in store.installed()
    ]
    available = fits.available(machine)
    return {
        "installed": installed,
        "available": [f.as_dict() for f in available],
        "offered": [] if installed else [f.name for f in fits.offer(available, machine)],
        "cached": [] if installed else reach.cached(),
        **asdict(machine),
        "offline": offline_by_environment(),
    }


def _ending(model: Any) -> dict[str, bool]:
    """Whether a conversation gives tokens up when its context is full; nothing where a server decides."""
    eviction = getattr(model, "eviction", None)
    return {} if eviction is None else {"evicts": eviction(chat=True) is not None}


def load_model(name: str, options: dict[str, Any], progress: Callable[[str, int, int], None]) -> Any:
    """A Model, downloaded first if need be; options: those of LoadOptions."""
    how = LoadOptions.made(options)
    progress("Starting the engine", 0, 0)
    from tinychat.hub import transfer
    from tinychat.loading import load

    transfer.listener = lambda label, done, total: progress(f"Downloading {label}", done, total)
    progress(f"Loading {name}", 0, 0)
    return load(name, how, progress=lambda what: progress(what, 0, 0))
