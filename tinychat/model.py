"""A loaded model: what `tinychat.load` gives, and what Python programs talk to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.backends.interface import BLOCK, Backend
from tinychat.base import arguments
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.base.events import Completion, Done, Event
from tinychat.base.extras import import_torch
from tinychat.base.machine import available_memory, has_gpu, human_bytes
from tinychat.engine.engine import Engine
from tinychat.engine.eviction import POLICIES, SINKS, SMALLEST, EvictionPolicy
from tinychat.engine.sampling import SamplingParams
from tinychat.formats import open_checkpoint
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.session import Session
from tinychat.text import rendering
from tinychat.text.oversized import refuse_oversized
from tinychat.text.template import ChatTemplate

if TYPE_CHECKING:
    from tinychat.engine.speculation.speculator import Speculator

DEFAULT_CTX = 8192
DEVICES = ("auto", "cpu", "cuda", "reference")
AUTO_GPU = False  # until the CUDA engine has been run on a GPU: docs/performance.md lists what was not
KV_DISK_BUDGET = 4_000_000_000  # bytes for all chats together
HEADROOM = 300_000_000  # bytes left for everything that is neither weights nor KV


def load(
    model: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    act_bits: int | None = None,
    head_bits: int = 8,
    ctx: int | None = None,
    quantize: str = "auto",
    kv_bits: int = 16,
    kv_budget: int | None = None,
    kv_policy: str | None = None,
    kv_disk_budget: int | None = None,
    draft: str | None = None,
    draft_tokens: int | None = None,
    think: bool | None = None,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Load a model: an alias (downloaded if need be), a Hugging Face repo id, a local folder or a .gguf file.

    device     "auto" (the CPU, until the CUDA engine has been run on a GPU) | "cpu" | "cuda" | "reference"
               (torch, fp32: slow, the truth)
    threads    CPU threads; default: the cores this process may use
    act_bits   8 or 16: activation precision of the CPU kernels
    head_bits  8 or 16: how an embedding and output head stored in 16 bits run
    ctx        tokens the context holds; default: the smaller of the trained context, 8192 and what fits in
               memory
    quantize   "auto" | "rtn" | "none": how weights stored in 16 or 32 bits run (`prepare.WeightPolicy`)
    kv_bits    16 or 8: how keys and values are cached
    kv_budget  tokens that a conversation keeps in the cache; beyond it the policy gives some up
    kv_policy  "h2o" (those that the model attends to least), "window" (the oldest) or "none" (the answer
               ends). Default: "h2o" where there is a budget, and for conversations when their context is full
    kv_disk_budget  bytes that the KV caches of stored chats may take on disk together (default 4 GB; 0: none)
    draft      "ngram" | "none" | a smaller model of the same family: who drafts tokens for verification; the
               text is
               the same. Default: "ngram" where the backend's rows are independent of each other
    draft_tokens  how many to draft, always; default: as many as pay
    think      whether the model reasons before it answers, where its chat template has a switch for that

    progress   hears in words what takes long: kernels that are compiled the first time a GPU is used

    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError, MemoryBudgetError, DownloadError,
    UsageError.
    """
    from tinychat.hub import store

    arguments.path("The model", model)
    policy = WeightPolicy(quantize, arguments.integer("head_bits", head_bits))
    kv_bits = arguments.integer("kv_bits", kv_bits)
    threads, act_bits, ctx, kv_budget, kv_disk_budget, draft_tokens = (
        None if value is None else arguments.integer(name, value, low, high)
        for name, value, low, high in (
            ("threads", threads, 1, 1024),
            ("act_bits", act_bits, 0, None),
            ("ctx", ctx, 1, None),
            ("kv_budget", kv_budget, 0, None),
            ("kv_disk_budget", kv_disk_budget, 0, None),
            ("draft_tokens", draft_tokens, 0, 15),
        )
    )
    _check_settings(device, act_bits, kv_bits, kv_policy, kv_budget, draft, think, offline, progress)
    path = store.resolve(str(model), offline=offline)
    rendering.prepare()  # beside the weights
    checkpoint = open_checkpoint(path)
    cfg = checkpoint.config
    longest = max(cfg.context_length, cfg.long_context)
    if ctx is not None and not 1 <= ctx <= longest:
        raise UsageError(
            f"A context of {ctx} tokens is outside what the model was trained for.",
            f"Use --ctx 1 to {longest}.",
        )
    checkpoint.config = cfg.for_context(ctx or 1)
    checkpoint.tokenizer()  # one that is refused is refused before weights are read
    backend = make_backend(checkpoint, policy, device, threads, act_bits, kv_bits, progress)
    loaded = Model(checkpoint, backend, str(model), ctx, policy)
    loaded.draft_tokens = draft_tokens
    loaded.kv_budget, loaded.kv_policy = kv_budget, kv_policy
    if kv_disk_budget is not None:
        loaded.kv_disk_budget = kv_disk_budget
    loaded.eviction(kv_budget, kv_policy)  # refuse what cannot work now, not in the middle of a chat
    if draft is not None:
        loaded.draft = draft
    if think is not None:
        loaded.think(think)
    return loaded


def _check_settings(
    device: str,
    act_bits: int | None,
    kv_bits: int,
    kv_policy: str | None,
    kv_budget: int | None,
    draft: str | None,
    think: bool | None,
    offline: bool,
    progress: Callable[[str], None] | None,
) -> None:
    """Raises UsageError for what no model could run with."""
    arguments.choice("device", device, DEVICES, f"Use {', '.join(DEVICES)}.")
    if act_bits not in (None, 8, 16):
        raise UsageError(f"act_bits is {act_bits}.", "Use 8 or 16.")
    if kv_bits not in (8, 16):
        raise UsageError(f"kv_bits is {kv_bits}.", "Use 8 or 16.")
    if draft is not None:
        arguments.text("draft", draft)
    if think is not None:
        arguments.flag("think", think)
    arguments.flag("offline", offline)
    if progress is not None and not callable(progress):
        raise UsageError(f"progress is {arguments.shown(progress)}.", "Give a function of one text.")
    _check_policy(kv_policy)
    if kv_budget is not None and kv_policy == "none":
        raise UsageError("A KV budget needs a policy that keeps it.", "Leave out --kv-policy none.")


def _check_policy(name: str | None) -> None:
    if name is not None:
        arguments.choice("kv_policy", name, ("none", *POLICIES), "Use h2o, window or none.")


def make_backend(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    device: str,
    threads: int | None,
    act_bits: int | None,
    kv_bits: int = 16,
    progress: Callable[[str], None] | None = None,
) -> Backend:
    """The backend for a device, loaded; progress as in `load`.

    Raises MemoryBudgetError before anything is read if it cannot fit.
    """
    if device == "cuda":
        return _cuda(checkpoint, policy, kv_bits, progress)
    if device == "auto" and AUTO_GPU and has_gpu():
        try:
            return _cuda(checkpoint, policy, kv_bits, progress)
        except TinychatError as e:
            warnings.warn(f"The CPU is used: {e.what}", RuntimeWarning, stacklevel=2)
    # Mapped packs can be dropped by the system, but a model larger than memory would crawl.
    _check_room(checkpoint, 4 if device == "reference" else 0.55, available_memory())
    if device == "reference":
        import_torch("The reference device")
        from tinychat.backends.reference import ReferenceBackend

        return ReferenceBackend(checkpoint, policy, threads, kv_bits=8 if kv_bits == 8 else 32)
    from tinychat.backends.cpu import CpuBackend

    return CpuBackend(checkpoint, policy, threads=threads, act_bits=act_bits, kv_bits=kv_bits, tell=progress)


def _cuda(
    checkpoint: Checkpoint, policy: WeightPolicy, kv_bits: int, progress: Callable[[str], None] | None
) -> Backend:
    from tinychat.backends.cuda import CudaBackend
    from tinychat.backends.cuda_device import free_memory, open_modules

    modules = open_modules(tell=progress)
    _check_room(checkpoint, 0.55, free_memory(modules.device))
    return CudaBackend(checkpoint, policy, kv_bits=kv_bits, modules=modules, tell=progress)


def _check_room(checkpoint: Checkpoint, bytes_a_weight: float, free: int) -> None:
    need = count_weights(checkpoint.config) * bytes_a_weight
    if need + HEADROOM > free:
        raise MemoryBudgetError(
            f"{checkpoint.path.name} needs {human_bytes(need)} beside {human_bytes(HEADROOM)} to work in, "
            f"and {human_bytes(free)} are free.",
            "Choose a smaller model, or close other programs.",
        )


def count_weights(cfg: ModelConfig) -> int:
    """Weights of the linears, the embedding and the head."""
    linears = FAMILIES[cfg.family].linears
    body = sum(n * k for layer in range(cfg.n_layers) for n, k in linears(cfg, layer).values())
    return body + cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)


def free_memory(backend: Backend) -> int:
    """Bytes free where the backend keeps its cache."""
    return getattr(backend, "free_memory", available_memory)()


def room_for_tokens(backend: Backend) -> int:
    """Tokens for whose keys and values there is memory beside what is in use."""
    return max(0, free_memory(backend) - HEADROOM) // backend.kv_bytes_per_block() * BLOCK


class Model:
    """In memory: `tokenizer`, `config`, `logits`, `generate`, `chat`, `session`. A context manager."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        name: str,
        ctx: int | None = None,
        policy: WeightPolicy | None = None,
    ):
        self._checkpoint, self._policy = checkpoint, policy or WeightPolicy()
        self.name, self.path, self.config = name, checkpoint.path, checkpoint.config
        self.backend = backend
        self.tokenizer = checkpoint.tokenizer()
        self.tokenizer.n_embeddings = self.config.vocab_size
        self.template = (
            ChatTemplate(self.tokenizer.chat_template, self.tokenizer)
            if self.tokenizer.chat_template
            else None
        )
        defaults = getattr(checkpoint, "sampling_defaults", dict)()
        self.default_sampling = SamplingParams().but(**defaults)
        room = partial(room_for_tokens, backend)
        self.engine = Engine(
            backend, self.tokenizer, self._fit_context(ctx), self.config.context_length, room
        )
        self.kv_budget: int | None = None
        self.kv_policy: str | None = None
        self.kv_disk_budget = KV_DISK_BUDGET
        self.draft = "ngram" if backend.row_independent else "none"
        self.draft_tokens: int | None = None
        self._draft_models: dict[str, Model] = {}
        self._refused_drafts: dict[str, UsageError] = {}

    def _fit_context(self, asked: int | None) -> int:
        per_block = self.backend.kv_bytes_per_block()
        fits = room_for_tokens(self.backend)
        wanted = asked or min(self.config.context_length, DEFAULT_CTX)
        if asked is None:
            wanted = min(wanted, fits)
        if wanted > fits or wanted < 1:
            least = max(wanted, BLOCK)
            safe = round(0.97 * fits / BLOCK) * BLOCK  # what is free changes a little from run to run
            raise MemoryBudgetError(
                f"A context of {least} tokens takes {human_bytes(least / BLOCK * per_block)} beside "
                f"{human_bytes(HEADROOM)} to work in, and {human_bytes(free_memory(self.backend))} are free.",
                f"Use --ctx {safe} or less." if safe >= BLOCK else "Choose a smaller model.",
            )
        return wanted

    def think(self, on: bool) -> None:
        """Whether to reason before answering. Raises UsageError where the template has no such switch."""
        arguments.flag("think", on)
        if self.template is None:
            raise UsageError(f"{self.name} has no chat template.", "Leave out --think and --no-think.")
        self.template.think(on)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self.engine.n_ctx

    def describe(self) -> dict[str, Any]:
        """What runs: backend, isa, act_bits, kv_bits, threads, ctx."""
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

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a bare prompt, with the beginning-of-text token where the model wants one."""
        arguments.text("The prompt", text, empty=True)
        head = [self.tokenizer.bos_id] if self.needs_bos(text) else []
        return head + self.tokenizer.encode(text)

    def eviction(
        self, budget: int | None = None, name: str | None = None, chat: bool = False
    ) -> EvictionPolicy | None:
        """What happens when the cache is full; None: the answer ends with `context_full`.

        budget and name as in `load`; those given there are the default. chat: a conversation falls back to
        "h2o" when its context is full.

        Raises UsageError for a budget outside the context, or too small to work with.
        """
        if budget is not None:
            budget = arguments.integer("kv_budget", budget)
        _check_policy(name)
        budget, name = budget or self.kv_budget, name or self.kv_policy
        asked = bool(budget or name)
        if name is None:
            name = "h2o" if budget or chat else "none"
        if name == "none":
            return None
        if self.config.window:
            if asked:
                raise UsageError(
                    f"{self.name} attends to sliding windows, in which nothing can be given up yet.",
                    "Leave out --kv-budget and --kv-policy.",
                )
            return None
        if budget is not None and budget > self.n_ctx:
            raise UsageError(
                f"A KV budget of {budget} tokens is larger than the context of {self.n_ctx}.",
                "Use a smaller --kv-budget or a larger --ctx.",
            )
        if not self.config.may_evict and (budget or self.kv_policy):
            raise UsageError(
                f"{self.name} has sliding windows or layers of their own positions: it keeps all tokens.",
                "Leave out --kv-budget and --kv-policy.",
            )
        if not self.config.may_evict or (budget is None and self.n_ctx // BLOCK * BLOCK < SINKS + SMALLEST):
            return None
        return EvictionPolicy.of(name, budget or self.n_ctx)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n_tokens, vocab]: row i is the prediction after token i. Raises UsageError on ids out of
        range.

        With a `kv_budget` or `kv_policy`, after what was given up until then.
        """
        return self.engine.logits(self._ids(token_ids), self.eviction())

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[Event]:
        """Continue a bare prompt (text or ids; no chat template). Yields events; sampling parameters by
        keyword.
        """
        speculator, params = self._settings(sampling)
        if isinstance(prompt, str):
            refuse_oversized(self.tokenizer, [prompt], self.n_ctx, self.eviction() is not None)
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else self._ids(prompt)
        branch = self.engine.branch(self.eviction())
        return self.engine.generate(branch, ids, params, speculator=speculator)

    def chat(self, messages: str | Iterable[Mapping[str, Any]], **sampling: Any) -> Completion:
        """One answer to {"role", "content"} messages (a text is what the user says). A model without a chat
        template continues their text.
        """
        messages = arguments.messages(messages)
        speculator, params = self._settings(sampling)
        said = [m["content"] for m in messages]
        refuse_oversized(self.tokenizer, said, self.n_ctx, self.eviction() is not None)
        if self.template is None:
            text = "".join(m["content"] for m in messages)
            ids, splitter = self.encode_prompt(text), None
        else:
            text = self.template.render(messages)
            ids = ([self.tokenizer.bos_id] if self.needs_bos(text) else []) + self.template.encode(text)
            splitter = self.template.splitter(text)
        branch = self.engine.branch(self.eviction())
        for event in self.engine.generate(branch, ids, params, speculator=speculator, splitter=splitter):
            if isinstance(event, Done):
                return event.completion
        raise AssertionError("a generation ends with Done")

    def session(self, system: str | None = None, **sampling: Any) -> Session:
        """A conversation with a memory. `draft`, `kv_budget` and `kv_policy` as in `load`; sampling
        parameters by keyword.
        """
        return Session(self, system, **sampling)

    def speculator(self, draft: str | None = None) -> Speculator:
        """Who drafts for one conversation; None is this model's default.

        "ngram", "none", a model, "layers:0-3,26-29" (those layers of this model), or "auto" (the draft that
        goes with this model's alias, if it is here; else "ngram").

        A draft model that is missing, too large or of another vocabulary is left out with a notice.
        """
        from tinychat.engine.speculation.control import Controller
        from tinychat.engine.speculation.draft_model import DraftModel, check_vocabulary
        from tinychat.engine.speculation.lookup import PromptLookup
        from tinychat.engine.speculation.speculator import Speculator

        if draft is not None:
            arguments.text("draft", draft)
        draft = draft or self.draft
        if draft == "auto":
            draft = self._recommended_draft()
        controller = Controller(self.draft_tokens)
        if draft == "none":
            return Speculator()
        if draft == "ngram":
            return Speculator(PromptLookup(), controller)
        try:
            if draft in self._refused_drafts:
                raise self._refused_drafts[draft]
            if draft not in self._draft_models:
                other = self._load_draft(draft)
                try:
                    check_vocabulary(self.tokenizer, other.tokenizer)
                except UsageError as e:  # it stays wrong, and is not loaded again to be told so
                    self._refused_drafts[draft] = e
                    other.close()
                    raise
                if self._draft_models.setdefault(draft, other) is not other:
                    other.close()  # another thread was faster
        except TinychatError as e:
            return Speculator(notice=f"No draft: {e.what}")
        other = self._draft_models[draft]
        vocab = min(self.config.vocab_size, other.config.vocab_size)
        return Speculator(DraftModel(other.engine, draft, vocab=vocab), controller)

    def _load_draft(self, draft: str) -> Model:
        facts = self.backend.describe()
        if not draft.startswith("layers:"):
            return load(draft, device=facts["backend"], threads=facts["threads"], draft="none")
        from tinychat.formats.subset import LayerSubset, parse_layers

        act_bits = facts["act_bits"] if facts["backend"] == "cpu" else None
        part = LayerSubset(self._checkpoint, parse_layers(draft.removeprefix("layers:")))
        backend = make_backend(part, self._policy, facts["backend"], facts["threads"], act_bits)
        return Model(part, backend, draft, policy=self._policy)

    def _recommended_draft(self) -> str:
        from tinychat.hub import aliases, store

        alias = aliases.ALIASES.get(self.name)
        if alias is None or alias.draft is None:
            return "ngram"
        installed = {m.name for m in store.installed()}
        return alias.draft if alias.draft.startswith("layers:") or alias.draft in installed else "ngram"

    def close(self) -> None:
        """Give threads and memory back. Idempotent."""
        for other in self._draft_models.values():
            other.close()
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, given: Iterable[int]) -> list[int]:
        return arguments.token_ids(given, self.config.vocab_size)

    def _settings(self, sampling: dict[str, Any]) -> tuple[Speculator, SamplingParams]:
        """Of one answer. The draft comes last: it may have to be loaded."""
        draft = sampling.pop("draft", None)
        params = self.default_sampling.but(**sampling)
        return self.speculator(draft), params
