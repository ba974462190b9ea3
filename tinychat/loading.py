"""From a name to a loaded model: `load`, the backend of a device, and draft models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from tinychat.backends.interface import Backend
from tinychat.base import arguments
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.base.extras import import_torch
from tinychat.base.machine import HEADROOM, available_memory, has_gpu, human_bytes
from tinychat.engine.speculation.draft_model import check_vocabulary
from tinychat.formats import open_checkpoint
from tinychat.model import Model, check_policy
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.text import rendering

DEVICES = ("auto", "cpu", "cuda", "reference")
AUTO_GPU = False  # until the CUDA engine has been run on a GPU: docs/performance.md lists what was not


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
    loaded = Model(checkpoint, backend, str(model), ctx, policy, Drafts())
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
    check_policy(kv_policy)
    if kv_budget is not None and kv_policy == "none":
        raise UsageError("A KV budget needs a policy that keeps it.", "Leave out --kv-policy none.")


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


class Drafts:
    """The draft models of one model, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, Model] = {}
        self._refused: dict[str, UsageError] = {}

    def recommended(self, model: Model) -> str:
        """The draft that goes with the model's alias, if it is here; else "ngram"."""
        from tinychat.hub import aliases, store

        alias = aliases.ALIASES.get(model.name)
        if alias is None or alias.draft is None:
            return "ngram"
        installed = {m.name for m in store.installed()}
        return alias.draft if alias.draft.startswith("layers:") or alias.draft in installed else "ngram"

    def get(self, model: Model, draft: str) -> Model:
        """The draft model of that name. Raises TinychatError where it is missing, too large or of another
        vocabulary.
        """
        if draft in self._refused:
            raise self._refused[draft]
        if draft not in self._loaded:
            other = self._load(model, draft)
            try:
                check_vocabulary(model.tokenizer, other.tokenizer)
            except UsageError as e:  # it stays wrong, and is not loaded again to be told so
                self._refused[draft] = e
                other.close()
                raise
            if self._loaded.setdefault(draft, other) is not other:
                other.close()  # another thread was faster
        return self._loaded[draft]

    def _load(self, model: Model, draft: str) -> Model:
        facts = model.backend.describe()
        if not draft.startswith("layers:"):
            return load(draft, device=facts["backend"], threads=facts["threads"], draft="none")
        from tinychat.formats.subset import LayerSubset, parse_layers

        act_bits = facts["act_bits"] if facts["backend"] == "cpu" else None
        part = LayerSubset(model.checkpoint, parse_layers(draft.removeprefix("layers:")))
        backend = make_backend(part, model.policy, facts["backend"], facts["threads"], act_bits)
        return Model(part, backend, draft, policy=model.policy)

    def close(self) -> None:
        """Close them all."""
        for other in self._loaded.values():
            other.close()
