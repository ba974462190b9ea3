"""Models that a server has, in place of one of this machine: the same conversations, and the same engine
behind the chat screen. Only answers come from there; branches, the store and the search are here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from tinychat.base.errors import ModelNotFoundError, UsageError
from tinychat.base.events import Event, Notice
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Settings, setting
from tinychat.base.terminal import clean
from tinychat.dialogue import Dialogue, Segments
from tinychat.process.address import LONGEST_ID, Address, KeySource, full_name, split_name
from tinychat.process.core import Core
from tinychat.process.local import LocalEngine
from tinychat.process.protocol import EngineEvent, Reply
from tinychat.process.served import Reader
from tinychat.process.server import AbortedError, Exchange, Server, ServerError

ATTEMPTS = 4  # at an answer of which nothing was said yet
WAIT = 0.5  # seconds before the second attempt, doubled each time
MOST_MODELS = 1000
ENDING = 1.0  # seconds that an engine which is closed is waited for
_CTX = ("max_model_len", "context_length", "max_context_length", "context_window", "n_ctx")
_UNKNOWN = ("unknown", "unrecognized", "unsupported", "not support", "not permitted", "unexpected", "extra")


@dataclass(frozen=True)
class ServerParams(Settings):
    """How a server shall choose tokens. None, the default of all: as the server does it by itself."""

    WHAT: ClassVar[str] = SamplingParams.WHAT

    temperature: float | None = setting(replace(SamplingParams.SETTINGS["temperature"], default=None))
    top_k: int | None = setting(replace(SamplingParams.SETTINGS["top_k"], default=None))
    top_p: float | None = setting(replace(SamplingParams.SETTINGS["top_p"], default=None))
    min_p: float | None = setting(replace(SamplingParams.SETTINGS["min_p"], default=None))
    repeat_penalty: float | None = setting(replace(SamplingParams.SETTINGS["repeat_penalty"], default=None))
    presence_penalty: float | None = setting(
        replace(SamplingParams.SETTINGS["presence_penalty"], default=None)
    )
    frequency_penalty: float | None = setting(
        replace(SamplingParams.SETTINGS["frequency_penalty"], default=None)
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(SamplingParams.SETTINGS["logit_bias"])
    max_tokens: int | None = setting(SamplingParams.SETTINGS["max_tokens"])
    think_budget: int | None = setting(SamplingParams.SETTINGS["think_budget"])
    seed: int | None = setting(SamplingParams.SETTINGS["seed"])
    stop: tuple[str, ...] = setting(SamplingParams.SETTINGS["stop"])

    def fields(self) -> dict[str, Any]:
        """Fields of a request: those that are set, by the names that servers know."""
        out = {k: v for k, v in vars(self).items() if v not in (None, ())}
        if "repeat_penalty" in out:
            out["repetition_penalty"] = out["repeat_penalty"]
        if "stop" in out:
            out["stop"] = list(out["stop"])
        if "logit_bias" in out:
            out["logit_bias"] = {str(id): bias for id, bias in out["logit_bias"]}
        return out


class ServedModel:
    """A model of a server. `id`: what the server calls it; `n_ctx`: tokens of its context, 0 if unknown."""

    default_sampling = ServerParams()
    template = "the server's"
    takes_tools = False

    def __init__(self, server: Server, id: str, n_ctx: int = 0, think: bool | None = None):
        self.server, self.id, self.n_ctx, self.think = server, id, n_ctx, think
        self.name = full_name(id, server.address)
        self.notices: list[str] = []
        self._left_out: set[str] = set()  # fields that the server does not know

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held here."""

    def session(self, system: str | None = None, **sampling: Any) -> RemoteSession:
        """A conversation; sampling parameters by keyword."""
        sampling.pop("kv_policy", None)
        return RemoteSession(self, system, **sampling)

    def describe(self) -> dict[str, Any]:
        """Facts of what answers."""
        ctx = {"ctx": self.n_ctx} if self.n_ctx else {}
        a = self.server.address
        return {"model": self.name, "backend": "server", "isa": a.place, "server": str(a), **ctx}

    def request(self, messages: list[dict[str, str]], params: ServerParams) -> dict[str, Any]:
        """Body of a question."""
        optional: dict[str, Any] = {"stream_options": {"include_usage": True}, **params.fields()}
        if self.think is not None:
            optional["chat_template_kwargs"] = {"enable_thinking": self.think}
        if "max_tokens" in self._left_out and "max_tokens" in optional:
            optional["max_completion_tokens"] = optional["max_tokens"]
        kept = {k: v for k, v in optional.items() if k not in self._left_out}
        return {"model": self.id, "messages": messages, "stream": True, **kept}

    def leave_out(self, e: ServerError, body: dict[str, Any]) -> str | None:
        """Leave out, from now on, the field of a request that the server says it does not know. A sentence
        about it, "" where nobody need hear one; None if that is not what is wrong.
        """
        said = e.what.lower()
        if e.status not in (400, 422) or not any(word in said for word in _UNKNOWN):
            return None
        known = ("model", "messages", "stream", "max_completion_tokens")
        field = max((k for k in body if k not in known and k in said), key=len, default=None)
        if field is None:
            return None
        self._left_out.add(field)
        if field in ("max_tokens", "stream_options"):
            return ""
        return f"{self.server.address} does not know {field}: it is left out."


class RemoteSession(Dialogue):
    """A conversation with a model of a server. Nothing of it is kept there, as far as we know."""

    PARAMS: ClassVar[type[Settings]] = ServerParams
    CONTINUES: ClassVar[bool] = False

    def __init__(self, model: ServedModel, system: str | None = None, **sampling: Any):
        super().__init__(system, model.default_sampling.but(**sampling))
        self.model = model
        self._exchange = Exchange()
        self._notices += model.notices
        model.notices = []

    def cancel(self) -> None:
        """Stop the running answer: its connection is closed at once. May be called from any thread."""
        super().cancel()
        self._exchange.abort()

    def _asked(self, question: int) -> Segments:
        return [("", [])]

    def _check_tools(self, tools: list[dict[str, Any]]) -> None:
        if tools:
            raise UsageError(
                "A server's models are not given tools yet.",
                "Leave them out, or choose a model of this machine.",
            )

    def _cut_ids(self, ids: list[int], text: str) -> list[int]:
        return []

    def _messages(self, question: int) -> list[dict[str, str]]:
        """The conversation to a question; what was thought before is not told again.

        Servers want turns that alternate, with something in each: a question whose answer failed before it
        began is left out, as a session takes it back; one whose answer is empty is one with the next.
        """
        out: list[dict[str, str]] = []
        for m in self.tree.messages(question):
            text = m.split()[1]
            if m.role == "assistant" and not text:
                if m.finish_reason in (None, "error") and out and out[-1]["role"] == "user":
                    out.pop()
            elif out and out[-1]["role"] == m.role:
                out[-1]["content"] += f"\n\n{text}"
            else:
                out.append({"role": m.role, "content": text})
        return out if self.system is None else [{"role": "system", "content": self.system}, *out]

    def _generate(self, question: int, prompt: Segments, params: ServerParams) -> Iterator[Event]:
        attempt = 1
        while True:
            body = self.model.request(self._messages(question), params)
            reader = Reader(self.model.server)
            try:
                yield from self._attempt(body, reader)
                return
            except ServerError as e:
                if reader.said:
                    raise
                if (left_out := self.model.leave_out(e, body)) is not None:
                    if left_out:
                        yield Notice(left_out)
                    continue
                if not e.again or attempt >= ATTEMPTS:
                    raise
                wait = max(e.wait, WAIT * 2 ** (attempt - 1))
                attempt += 1
                yield Notice(f"{e.what} Another attempt follows in {wait:.1f} s.")
                self._rest(wait)

    def _rest(self, seconds: float) -> None:
        """Wait, unless the answer is cancelled. In small steps: a handler of the same thread may cancel."""
        until = time.monotonic() + seconds
        while not self._cancel.is_set() and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.05, left))

    def _attempt(self, body: dict[str, Any], reader: Reader) -> Iterator[Event]:
        """One request and its answer. Raises ServerError."""
        exchange = self._exchange = Exchange()
        if self._cancel.is_set():  # before there was an exchange that it could have ended
            exchange.abort()
        try:
            if not exchange.ended:
                with closing(self.model.server.talk(exchange, "/chat/completions", body)) as chunks:
                    for chunk in chunks:
                        yield from reader.take(chunk)
        except AbortedError:
            pass
        except ServerError:
            if reader.finish is None:
                raise
        cancelled = exchange.ended and self._cancel.is_set()
        yield from reader.end()
        if not cancelled and reader.finish in (None, "abort", "error"):
            raise ServerError(
                f"{self.model.server.address} ended its answer early.",
                "Ask again; if that stays, look at the server's log.",
                again=True,
            )
        yield reader.done(cancelled)

    def count_tokens(self) -> int:
        """Tokens of the conversation when it was last answered, as the server counted them; 0 if unknown."""
        for m in reversed(self.tree.messages()):
            if m.stats:
                return m.stats.get("prompt_tokens", 0) + m.stats.get("generated_tokens", 0)
        return 0

    # Keeping it

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON, atomically."""
        self._write(path, self.model.name)

    def _params_as_kept(self) -> dict[str, Any]:
        return {k: v for k, v in super()._params_as_kept().items() if v is not None}

    @classmethod
    def load(cls, path: str | Path, model: ServedModel) -> RemoteSession:
        """Read a saved conversation. Raises TinychatError if the file is none."""
        _, saved, _ = cls._read(path)
        session = cls(model, saved.system, **ServerParams.sound(saved.params))
        session.tree = saved.tree
        return session

    def load_kv(self, path: Path) -> int:
        """Nothing is remembered here but words."""
        return 0

    def save_kv(self, path: Path) -> bool:
        """Nothing is remembered here but words."""
        return False


class Connector:
    """Finds models of servers. Calls may come from any thread; `abort` ends those that wait.

    server: where models are whose names have no address.
    """

    def __init__(self, server: Address, keys: KeySource | None = None):
        self.server, self.keys = server, keys or KeySource(server)
        self._waiting: set[Exchange] = set()
        self._aborts = 0
        self._lock = threading.Lock()

    def __call__(
        self, name: str, options: dict[str, Any], progress: Callable[[str, int, int], None]
    ) -> ServedModel:
        """The model of that name: ID, ID@URL, or @URL for the only one there is. `options`: think.

        Raises TinychatError.
        """
        id, address = split_name(name)
        address = address or self.server
        if len(id) > LONGEST_ID:
            raise UsageError("That name is too long.", f"Use at most {LONGEST_ID} characters.")
        server = Server(address, *self.keys.key(address))
        progress(f"Asking {address.place} for its models", 0, 0)
        found = self._found(server, named=bool(id))
        if not id and len(found) != 1:
            names = ", ".join(list(found)[:8]) + (", …" if len(found) > 8 else "")
            raise ModelNotFoundError(
                f"{address} has {len(found)} models{': ' if found else ''}{names}.",
                "Name one: /model NAME, or tinychat run --server URL NAME.",
            )
        known = _match(id, found) if id else next(iter(found))
        model = ServedModel(server, known or id, found.get(known or "", 0), options.get("think"))
        if known is None and found:
            near = get_close_matches(id, found, 1)
            hint = f" It lists {near[0]}." if near else ""
            model.notices.append(f"{address} does not list {clean(id)}: it is asked for it anyway.{hint}")
        return model

    def _found(self, server: Server, named: bool) -> dict[str, int]:
        """The models of a server, with a few attempts. One that does not list them may have them still."""
        aborts = self._aborts
        for attempt in range(ATTEMPTS):
            try:
                return self.models(server)
            except ServerError as e:
                if named and e.status in (404, 405, 501):
                    return {}
                if not e.again or attempt == ATTEMPTS - 1:
                    raise
                time.sleep(max(e.wait, WAIT * 2**attempt) / 2)
            if self._aborts != aborts:
                break
        raise ServerError("Asking for models was stopped.", "/model asks again.")

    def models(self, server: Server) -> dict[str, int]:
        """Names of a server's models, and the tokens of their contexts (0: unknown)."""
        exchange = Exchange()
        with self._lock:
            self._waiting.add(exchange)
        try:
            page = server.ask(exchange, "/models")
        except AbortedError:
            raise ServerError("Asking for models was stopped.", "/model asks again.") from None
        finally:
            with self._lock:
                self._waiting.discard(exchange)
        listed = page.get("data") if isinstance(page, dict) else None
        out: dict[str, int] = {}
        for m in listed[:MOST_MODELS] if isinstance(listed, list) else ():
            id = m.get("id") if isinstance(m, dict) else None
            if isinstance(id, str) and 0 < len(id) <= LONGEST_ID and id.isprintable():
                out[id] = _context(m)
        return out

    def list(self) -> dict[str, Any]:
        """The models of `server`, as the choice of models shows them."""
        found = self.models(Server(self.server, *self.keys.key(self.server)))
        installed = [
            {"name": full_name(id, self.server), "label": id, "ctx": ctx} for id, ctx in found.items()
        ]
        return {"installed": installed, "available": [], "server": str(self.server)}

    def abort(self) -> None:
        """Let nobody wait for a server any longer."""
        with self._lock:
            self._aborts += 1
            for exchange in self._waiting:
                exchange.abort()


def _match(id: str, found: dict[str, int]) -> str | None:
    """The listed model that a name means: the same, or ollama's and Hugging Face's short forms of it."""
    if id in found:
        return id
    short = [k for k in found if k == f"{id}:latest" or k.rpartition("/")[2].lower() == id.lower()]
    return short[0] if len(short) == 1 else None


def _context(m: dict[str, Any]) -> int:
    meta = m.get("meta")
    for values in (m, meta if isinstance(meta, dict) else {}):
        for key in _CTX:
            if type(n := values.get(key)) is int and 0 < n < 1 << 31:
                return n
    return 0


class RemoteCore(Core):
    """The core whose models are a server's."""

    def __init__(self, tell: Callable[[EngineEvent | Reply], None], connector: Connector):
        super().__init__(tell, connector)  # type: ignore[arg-type]  # a model as far as the core uses one
        self.connector = connector

    def _models(self) -> dict[str, Any]:
        return self.connector.list()

    def _count(self, text: str) -> int | None:
        return None

    def _limits(self) -> dict[str, float] | None:
        return None


class RemoteEngine(LocalEngine):
    """A ChatEngine whose answers come from a server."""

    def __init__(self, connector: Connector, on_event: Callable[[EngineEvent], None] = lambda event: None):
        super().__init__(on_event)
        self.connector = connector

    def _made_core(self, tell: Callable[[EngineEvent | Reply], None]) -> Core:
        return RemoteCore(tell, self.connector)

    async def close(self) -> None:
        """End the answer and whatever waits for the server. Idempotent."""
        core, self._core = self._core, None
        self._answer_all()
        if core is not None and self._thread is not None:
            core.end()
            self.connector.abort()
            await asyncio.to_thread(self._thread.join, ENDING)
