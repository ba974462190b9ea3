"""A loaded model: what `tinychat.load` gives, and what Python programs talk to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np

from tinychat.backends.interface import BLOCK, Backend
from tinychat.base import arguments
from tinychat.base import tools as checked_tools
from tinychat.base.aside import Aside
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.base.events import Completion, Done, Event
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import HEADROOM, human_bytes
from tinychat.base.sampling_params import SamplingParams
from tinychat.chat_request import ChatRequest, PromptRequest
from tinychat.embedding import EmbeddingRequest
from tinychat.engine.engine import Engine
from tinychat.engine.eviction import SINKS, SMALLEST, EvictionPolicy
from tinychat.engine.memory.sizes import memory_bytes, tokens_within
from tinychat.engine.odds import MOST
from tinychat.engine.penalties import check_bias
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_policy import WeightPolicy
from tinychat.session import Session
from tinychat.text import grammar
from tinychat.text.known_text import KnownText
from tinychat.text.oversized import refuse_oversized
from tinychat.text.response_format import Form
from tinychat.text.response_format import response_format as response_format_of
from tinychat.text.template import ChatTemplate

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from tinychat.engine.shelf import Shelf
    from tinychat.engine.speculation.speculator import Speculator
    from tinychat.formats.embedder import Pooling
    from tinychat.keywords import ChatKeywords, PromptKeywords, SamplingKeywords, SessionKeywords

DEFAULT_CTX = 8192
Messages = str | Iterable[Mapping[str, Any]]


def room_for_memories(backend: Backend) -> int:
    """Bytes that a model's memories may take beside what is in use."""
    return max(0, backend.free_memory() - HEADROOM)


class Drafts(Protocol):
    """Source of a model's draft models: `tinychat.loading.Drafts`."""

    def recommended(self, model: Model) -> str:
        """The draft that goes with the model."""
        ...

    def get(self, model: Model, draft: str) -> Model:
        """The draft model of that name; it stays the owner's. Raises TinychatError."""
        ...

    def close(self) -> None:
        """Close every draft model."""
        ...


class Model:
    """A loaded model: `tokenizer`, `config`, `logits`, `generate`, `chat`, `session`. A context manager."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        name: str,
        options: LoadOptions | None = None,
        drafts: Drafts | None = None,
    ):
        """options: those that the backend was loaded with. drafts: where draft models come from."""
        options = options or LoadOptions()
        self.checkpoint, self.policy = checkpoint, WeightPolicy(options.quantize, options.head_bits)
        self.name, self.path, self.config = name, checkpoint.path, checkpoint.config
        self.backend = backend
        self.pooling: Pooling | None = getattr(checkpoint, "pooling", None)  # of one that makes embeddings
        self.tokenizer = checkpoint.tokenizer()
        self.tokenizer.n_embeddings = self.config.vocab_size
        self.template = (
            ChatTemplate(self.tokenizer.chat_template, self.tokenizer)
            if self.tokenizer.chat_template
            else None
        )
        defaults: dict[str, Any] = getattr(checkpoint, "sampling_defaults", dict)()
        self.default_sampling = SamplingParams().but(**defaults)
        room = partial(room_for_memories, backend)
        self.engine = Engine(
            backend, self.tokenizer, self._fit_context(options.ctx), self.config.context_length, room
        )
        self.kv_budget, self.kv_policy = options.kv_budget, options.kv_policy
        self.kv_disk_budget = options.kv_disk_budget
        # The draft that the backend makes itself: its own layer, or the head that it was loaded with.
        self.own_draft = (
            (options.draft if "head" in backend.describe() else "mtp") if backend.predicts else None
        )
        best = self.own_draft or "ngram"
        self.draft = options.draft or (best if backend.row_independent else "none")
        self.draft_tokens = options.draft_tokens
        self.drafts = drafts
        self.known = KnownText()
        self.shelf: Shelf | None = None  # where conversations wait for their next request; a server has one

    def _fit_context(self, asked: int | None) -> int:
        most = max(self.config.context_length, asked or 0, BLOCK)
        fits = tokens_within(self.backend, room_for_memories(self.backend), most)
        wanted = asked or min(self.config.context_length, DEFAULT_CTX)
        if asked is None:
            wanted = min(wanted, fits)
        if wanted > fits or wanted < 1:
            least = max(wanted, BLOCK)
            safe = round(0.97 * fits / BLOCK) * BLOCK  # what is free changes a little from run to run
            raise MemoryBudgetError(
                f"A context of {least} tokens takes {human_bytes(memory_bytes(self.backend, least))} beside"
                f" {human_bytes(HEADROOM)} to work in, and {human_bytes(self.backend.free_memory())}"
                " are free.",
                f"Use --ctx {safe} or less." if safe >= BLOCK else "Choose a smaller model.",
            )
        return wanted

    def think(self, on: bool) -> None:
        """Whether to reason before answering. Raises UsageError where the template has no such switch."""
        arguments.flag("think", on)
        if self.template is None:
            raise UsageError(f"{self.name} has no chat template.", "Leave out --think and --no-think.")
        self.template.think(on)

    def effort(self, level: str) -> None:
        """How much to reason before answering. Raises UsageError where the template has no levels."""
        if self.template is None:
            raise UsageError(f"{self.name} has no chat template.", "Leave out --effort.")
        self.template.effort(level)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self.engine.n_ctx

    def describe(self) -> dict[str, Any]:
        """Facts of what runs: backend, isa, act_bits, kv_bits, threads, ctx."""
        return {"model": self.name, **self.backend.describe(), "ctx": self.n_ctx}

    def needs_bos(self, text: str) -> bool:
        """Whether a beginning-of-text token goes before `text`: asked for by the tokenizer, not yet in the
        text.
        """
        t = self.tokenizer
        if not t.add_bos or t.bos_id is None:
            return False
        spelled = t.special_tokens.get("bos_token")
        return not (spelled and text.startswith(spelled))

    def _bos(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos] if bos is not None and self.needs_bos(text) else []

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a bare prompt, with the beginning-of-text token where the model wants one."""
        arguments.text("The prompt", text, empty=True)
        return self._bos(text) + self.tokenizer.encode(text)

    def eviction(
        self, budget: int | None = None, name: str | None = None, chat: bool = False
    ) -> EvictionPolicy | None:
        """Policy for a full cache; None: the answer ends with `context_full`.

        budget and name as in `load`; those given there are the default. chat: a conversation falls back to
        "h2o" when its context is full.

        Raises UsageError for a budget outside the context, or too small to work with.
        """
        if budget is not None:
            LoadOptions.SETTINGS["kv_budget"].check("kv_budget", budget)
        if name is not None:
            LoadOptions.SETTINGS["kv_policy"].check("kv_policy", name)
        budget, name = budget or self.kv_budget, name or self.kv_policy
        asked = bool(budget or name)
        if name is None:
            name = "h2o" if budget or chat else "none"
        if name == "none":
            return None
        if budget is not None and budget > self.n_ctx:
            raise UsageError(
                f"A KV budget of {budget} tokens is larger than the context of {self.n_ctx}.",
                "Use a smaller --kv-budget or a larger --ctx.",
            )
        n_paged = sum(spec.kind == "paged" for spec in self.backend.memories)
        keeps_all = not self.config.may_evict or n_paged > 1
        if keeps_all and asked:
            fixed = any(not a.turnable for a in self.config.attentions)
            what = (
                "norms keys behind their rotation" if fixed else "has rotary angles that depend on the length"
            )
            if n_paged > 1:
                what = "has layers of different KV heads"
            raise UsageError(
                f"{self.name} {what}: it keeps all tokens.", "Leave out --kv-budget and --kv-policy."
            )
        if keeps_all or (budget is None and self.n_ctx // BLOCK * BLOCK < SINKS + SMALLEST):
            return None
        if n_paged == 0:  # windows and states forget by themselves; positions are counted anew now and then
            name = "window"
        return EvictionPolicy.of(name, budget or self.n_ctx)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n_tokens, vocab]: row i is the prediction after token i. Raises UsageError on ids out of
        range.

        With a `kv_budget` or `kv_policy`, after what was given up until then.
        """
        return self.engine.logits(self._ids(token_ids), self.eviction())

    def generate(
        self, prompt: str | Sequence[int], **options: Unpack[PromptKeywords]
    ) -> Generator[Event, None, None]:
        """Continue a bare prompt (text or ids; no chat template). Yields events. options: sampling
        parameters, `draft` and `logprobs` as in `request`.
        """
        return self.continuing(prompt, **options).events(self)

    def agenerate(self, prompt: str | Sequence[int], **options: Unpack[PromptKeywords]) -> Aside[Event]:
        """`generate` for coroutines: `async for event in model.agenerate("…")`."""
        cancel = threading.Event()
        return Aside(lambda: self.continuing(prompt, **options).events(self, cancel), cancel.set)

    def continuing(
        self,
        prompt: str | Sequence[int],
        *,
        draft: str | None = None,
        logprobs: int | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> PromptRequest:
        """What `generate` asks for, checked. Raises UsageError."""
        odds, params = _top(logprobs), self._params(sampling)
        if isinstance(prompt, str):
            refuse_oversized(self.tokenizer, [prompt], self.n_ctx, self.eviction() is not None)
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else self._ids(prompt)
        return PromptRequest(ids, params, draft, odds)

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[ChatKeywords]
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatKeywords]
    ) -> Generator[Event, None, None]: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatKeywords]
    ) -> Completion | Generator[Event, None, None]:
        """One answer to {"role", "content"} messages (a text is what the user says). A model without a chat
        template continues their text.

        stream: the answer's events, while it is being made, in place of the whole. options: sampling
        parameters, those of `request`, and of tools: `tools` (functions, or schemas as OpenAI's API has
        them), `tool_choice` ("auto", "none", "required", or a name) and `parallel_tool_calls`.
        """
        arguments.flag("stream", stream)
        events = self.request(messages, **options).events(self)
        if stream:
            return events
        for event in events:
            if isinstance(event, Done):
                return event.completion
        raise AssertionError("a generation ends with Done")

    @overload
    def achat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[ChatKeywords]
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def achat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatKeywords]
    ) -> Aside[Event]: ...

    def achat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatKeywords]
    ) -> Coroutine[Any, Any, Completion] | Aside[Event]:
        """`chat` for coroutines: `await model.achat("…")`, or `async for event in model.achat("…",
        stream=True)`. A thread of its own makes the answer; cancelling the task stops it between two steps.
        """
        cancel = threading.Event()

        def events() -> Generator[Event, None, None]:
            return self.request(messages, **options).events(self, cancel)

        if arguments.flag("stream", stream):
            return Aside(events, cancel.set)
        return _awaited(Aside(lambda: (e for e in events() if isinstance(e, Done)), cancel.set))

    def request(
        self,
        messages: Messages,
        *,
        draft: str | None = None,
        response_format: Mapping[str, Any] | Form | None = None,
        think: bool | None = None,
        effort: str | None = None,
        tools: Iterable[Callable[..., Any] | Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        logprobs: int | None = None,
        go_on: bool = False,
        **sampling: Unpack[SamplingKeywords],
    ) -> ChatRequest:
        """What `chat` asks for, checked. Raises UsageError.

        draft: as in `load`. response_format: what the answer is held to: `{"type": "json_schema",
        "json_schema": {"schema": …}}`, `{"type": "json_object"}`, `{"type": "regex", "pattern": …}`,
        `{"type": "choice", "choices": […]}` or `{"type": "grammar", "grammar": …}`. think: whether to reason
        before answering, effort: how much, where the chat template knows these.
        logprobs: how many of the likeliest tokens are told with each one's log-probability. go_on: the last
        message is an answer that was begun; what is new of it is told.
        """
        said, form = arguments.messages(messages), response_format_of(response_format)
        begun = arguments.begun(said) if arguments.flag("go_on", go_on) else None
        said = said if begun is None else said[:-1]
        given = checked_tools.tools(tools)
        choice = checked_tools.tool_choice(tool_choice, given)
        several = arguments.flag("parallel_tool_calls", parallel_tool_calls)
        if given and self.template is None:
            raise UsageError(f"{self.name} has no chat template, and knows no tools.", "Choose a chat model.")
        odds, params = _top(logprobs), self._params(sampling)
        if (think is not None or effort is not None) and self.template is not None:
            self.template.switches(think, effort)
        elif think is not None or effort is not None:
            raise UsageError(f"{self.name} has no chat template.", "Leave out think and effort.")
        if form is not None:
            grammar.matcher(form, self.tokenizer)  # says now what is wrong with it
        if self.template is not None and choice != "none":
            told = [t for t in given if t["function"]["name"] == choice] or given
            form = self.template.tools.form(told, choice != "auto", several, form) if told else form
        return ChatRequest(said, params, draft, given, choice, several, form, think, effort, odds, begun)

    def session(self, system: str | None = None, **options: Unpack[SessionKeywords]) -> Session:
        """A conversation with a memory. options: sampling parameters; `draft`, `kv_budget` and `kv_policy` as
        in `load`; `response_format` as in `request`.
        """
        self._refuse_embedder()
        return Session(self, system, **options)

    def embed(self, texts: Sequence[str], dimensions: int | None = None) -> NDArray[np.float32]:
        """A vector for each text, float32 [n, dimensions], as sentence-transformers makes them of a folder
        that it wrote. dimensions: the first so many; None: all.

        Raises UsageError for a chat model, and for a text that the context does not hold.
        """
        if self.pooling is None:
            raise UsageError(
                f"{self.name} is a chat model and makes no embeddings.", "Load an embedding model."
            )
        given = [arguments.text("A text", text) for text in texts]
        request = EmbeddingRequest.of(self, self.pooling, given, dimensions)
        return np.stack([made.vector for made in request.events(self)])

    def _refuse_embedder(self) -> None:
        if self.pooling is not None:
            raise UsageError(f"{self.name} makes embeddings, and does not chat.", "Choose a chat model.")

    def speculator(self, draft: str | None = None) -> Speculator:
        """Drafter for one conversation; None is this model's default.

        "mtp" (the model's own layer that predicts further), "ngram", "none", a model, the EAGLE-3 head that
        this model was loaded with, "layers:0-3,26-29" (those layers of this model), or "auto" (head or "mtp",
        where the model has one; else the draft that goes with its alias, if it is here; else "ngram").

        A draft model that is missing, too large or of another vocabulary is left out with a notice.
        """
        from tinychat.engine.speculation.control import Controller
        from tinychat.engine.speculation.draft_model import DraftModel
        from tinychat.engine.speculation.further import FurtherLayer
        from tinychat.engine.speculation.lookup import PromptLookup
        from tinychat.engine.speculation.speculator import Speculator

        if draft is not None:
            arguments.text("draft", draft)
        draft = draft or self.draft
        if draft == "auto":
            recommended = self.drafts.recommended(self) if self.drafts else "ngram"
            draft = self.own_draft or recommended
        controller = Controller(self.draft_tokens)
        if draft == "none":
            return Speculator()
        if draft == "ngram":
            return Speculator(PromptLookup(), controller)
        if draft == self.own_draft:
            return Speculator(FurtherLayer(self.engine, "mtp" if draft == "mtp" else "eagle3"), controller)
        if draft == "mtp":
            return Speculator(notice=f"No draft: {self.name} runs without a layer that predicts further.")
        if self.drafts is None:
            return Speculator(notice=f"No draft: {self.name} was not loaded by name.")
        try:
            other = self.drafts.get(self, draft)
        except TinychatError as e:
            return Speculator(notice=f"No draft: {e.what}")
        vocab = min(self.config.vocab_size, other.config.vocab_size)
        return Speculator(DraftModel(other.engine, draft, vocab=vocab), controller)

    def close(self) -> None:
        """Give threads and memory back. Idempotent."""
        if self.drafts is not None:
            self.drafts.close()
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        facts, family = self.backend.describe(), self.config.family
        return f"<Model {self.name}: {family}, {facts['backend']} {facts['isa']}, context {self.n_ctx}>"

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        self._refuse_embedder()
        return check_bias(self.default_sampling.but(**sampling), self.config.vocab_size)

    def _ids(self, given: Iterable[int]) -> list[int]:
        return arguments.token_ids(given, self.config.vocab_size)


async def _awaited(ends: Aside[Done]) -> Completion:
    done = [end async for end in ends]  # to the end of the thread
    return done[0].completion


def _top(logprobs: int | None) -> int | None:
    return None if logprobs is None else arguments.integer("logprobs", logprobs, 0, MOST)
