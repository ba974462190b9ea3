"""Models that a server has, in place of one of this machine: the same conversations. Only answers come from
there; branches, the store and the search are here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinychat.base.errors import UsageError
from tinychat.base.events import Event, Notice
from tinychat.base.settings import Settings
from tinychat.conversation import Message
from tinychat.dialogue import Dialogue, Segments
from tinychat.process.address import full_name
from tinychat.process.served import Reader
from tinychat.process.server import AbortedError, Exchange, Server, ServerError
from tinychat.process.server_params import ServerParams
from tinychat.text.reasoning import split_thought
from tinychat.text.response_format import Form, response_format

ATTEMPTS = 4  # at an answer of which nothing was said yet
WAIT = 0.5  # seconds before the second attempt, doubled each time
CONTINUE = ("vllm", "sglang", "llamacpp", "tinychat")  # owners of models, whose servers go on with answers
# Fields whose wish must not be passed over in silence.
NEEDED = ("tools", "response_format", "continue_final_message", "add_generation_prompt")
_UNKNOWN = ("unknown", "unrecognized", "unsupported", "not support", "not permitted", "unexpected", "extra")


@dataclass(frozen=True)
class Listed:
    """What a server's list says of a model: tokens of its context (0: unknown), and who serves it."""

    n_ctx: int = 0
    owner: str = ""


class ServedModel:
    """A model of a server. `id`: what the server calls it; `n_ctx`: tokens of its context, 0 if unknown;
    `continues`: whether it is known to go on with answers that were cut.
    """

    default_sampling = ServerParams()
    template = "the server's"
    takes_tools = True  # as far as we know

    def __init__(
        self,
        server: Server,
        id: str,
        listed: Listed | None = None,
        think: bool | None = None,
        effort: str | None = None,
    ):
        self.server, self.id, self.think, self.effort = server, id, think, effort
        listed = listed or Listed()
        self.n_ctx, self.continues = listed.n_ctx, listed.owner in CONTINUE
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

    def request(
        self, messages: list[dict[str, Any]], params: ServerParams, going_on: bool = False, **more: Any
    ) -> dict[str, Any]:
        """Body of a question. going_on: the last message is an answer that goes on. more: further fields,
        none of which may be left out.
        """
        optional: dict[str, Any] = {"stream_options": {"include_usage": True}, **params.fields()}
        if self.effort is not None:
            optional["reasoning_effort"] = self.effort
        think = False if going_on else self.think  # the thought is over
        if think is not None:  # Qwen's switch and most others'; DeepSeek's and Kimi's
            optional["chat_template_kwargs"] = {"enable_thinking": think, "thinking": think}
        if going_on:
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        if "max_tokens" in self._left_out and "max_tokens" in optional:
            optional["max_completion_tokens"] = optional["max_tokens"]
        kept = {k: v for k, v in optional.items() if k not in self._left_out}
        return {"model": self.id, "messages": messages, "stream": True, **more, **kept}

    def leave_out(self, e: ServerError, body: dict[str, Any]) -> str | None:
        """Leave out, from now on, the field of a request that the server says it does not know. A sentence
        about it, "" where nobody need hear one; None if that is not what is wrong.
        """
        said = e.what.lower()
        if e.status not in (400, 422) or not any(word in said for word in _UNKNOWN):
            return None
        known = ("model", "messages", "stream", "max_completion_tokens", *NEEDED)
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

    def __init__(self, model: ServedModel, system: str | None = None, **sampling: Any):
        super().__init__(system, model.default_sampling.but(**sampling))
        self.model = model
        self._exchange = Exchange()
        self._form: Mapping[str, Any] | None = None
        self._notices += model.notices
        model.notices = []

    def cancel(self) -> None:
        """Stop the running answer: its connection is closed at once. May be called from any thread."""
        super().cancel()
        self._exchange.abort()

    @property
    def continues(self) -> bool:
        """Whether an answer that was stopped or cut can go on."""
        return self.model.continues

    @property
    def response_format(self) -> Mapping[str, Any] | None:
        """JSON schema that the server is asked to hold the next answers to, as OpenAI's API has it."""
        return self._form

    @response_format.setter
    def response_format(self, value: Mapping[str, Any] | None) -> None:
        form = None if isinstance(value, Form) else response_format(value)
        if isinstance(value, Form) or (form is not None and form.kind != "json_schema"):
            raise UsageError(
                "A server is asked for JSON schemas, and for no other form.",
                'Use {"type": "json_schema", "json_schema": {"schema": …}}.',
            )
        self._form = None if form is None else value

    def _asked(self, question: int) -> Segments:
        return [("", [])]

    def _cut_ids(self, ids: list[int], text: str) -> list[int]:
        return []

    def _messages(self, question: int) -> list[dict[str, Any]]:
        """The conversation to a question; what was thought before is not told again.

        Servers want turns that alternate, with something in each: a question whose answer failed before it
        began is left out, as a session takes it back; one whose answer is empty is one with the next.
        """
        out: list[dict[str, Any]] = []
        for m in self.tree.messages(question):
            text = m.split()[1]
            if m.role == "tool":
                out.append({"role": m.role, "content": m.content, "tool_call_id": m.tool_call_id})
            elif m.tool_calls:
                out.append({"role": m.role, "content": text, "tool_calls": m.tool_calls})
            elif m.role == "assistant" and not text:
                if m.finish_reason in (None, "error") and out and out[-1]["role"] == "user":
                    out.pop()
            elif out and out[-1]["role"] == m.role and "tool_calls" not in out[-1]:
                out[-1]["content"] += f"\n\n{text}"
            else:
                out.append({"role": m.role, "content": text})
        return out if self.system is None else [{"role": "system", "content": self.system}, *out]

    def _generate_more(
        self, answer: Message, question: int, prompt: Segments, params: ServerParams
    ) -> Iterator[Event]:
        thought, text, closed = split_thought(answer.content)
        if not self.continues:
            raise UsageError(
                f"{self.model.server.address} is not known to go on with answers.",
                "Those of tinychat, vLLM, SGLang and llama.cpp do. Here, ask for the rest of it.",
            )
        if not closed or (thought is not None and not text):
            raise UsageError(
                "The answer was cut in its thought, and a server goes on with answers alone.",
                "Let it answer again, perhaps with more max_tokens.",
            )
        return self._generate(question, prompt, params, (thought or "", text) if text else None)

    def _generate(
        self,
        question: int,
        prompt: Segments,
        params: ServerParams,
        begun: tuple[str, str] | None = None,
    ) -> Iterator[Event]:
        """begun: thought and text of the answer that goes on."""
        attempt = 1
        messages = self._messages(question)
        if begun is not None:
            messages.append({"role": "assistant", "content": begun[1]})
        more: dict[str, Any] = {"tools": self.tools} if self.tools else {}
        if self._form is not None:
            more["response_format"] = _named(self._form)
        while True:
            body = self.model.request(messages, params, begun is not None, **more)
            reader = Reader(self.model.server, begun)
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
        _, saved, _ = cls.read_saved(path)
        session = cls(model, saved.system, **ServerParams.sound(saved.params))
        session.tree = saved.tree
        return session

    def load_kv(self, path: Path) -> int:
        """Nothing is remembered here but words."""
        return 0

    def save_kv(self, path: Path) -> bool:
        """Nothing is remembered here but words."""
        return False


def _named(form: Mapping[str, Any]) -> Mapping[str, Any]:
    """The form with a name for its schema, which OpenAI's API wants."""
    if not isinstance(inner := form.get("json_schema"), Mapping):
        return form
    return {**form, "json_schema": {"name": "answer", "strict": True, **inner}}
