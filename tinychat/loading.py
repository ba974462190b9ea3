"""From a name to a loaded model: `load`, the backend of a device, and draft models."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.backends.interface import Backend
from tinychat.backends.plan import too_large
from tinychat.base import arguments
from tinychat.base.errors import MemoryBudgetError, ModelNotFoundError, TinychatError, UsageError
from tinychat.base.extras import import_torch
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import HEADROOM, available_memory, has_gpu, human_bytes, human_rate
from tinychat.engine.speculation.draft_model import check_vocabulary
from tinychat.formats import open_checkpoint
from tinychat.formats.eagle import EagleHead, head_in
from tinychat.formats.embedder import EmbeddingCheckpoint, for_embeddings
from tinychat.model import Model
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.family import outside
from tinychat.network.weight_policy import WeightPolicy
from tinychat.text import rendering

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tinychat.keywords import LoadKeywords

WORDS = ("auto", "mtp", "ngram", "none")  # drafts that are no models


def load(
    model: str | Path,
    options: LoadOptions | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    **changes: Unpack[LoadKeywords],
) -> Model:
    """Load a model: an alias (downloaded if need be), a Hugging Face repo id, a local folder or a .gguf file.

    options    how; each of them may be given by keyword instead, as in `load("smollm2-135m", ctx=4096)`
    progress   hears in words what takes long: kernels that are compiled the first time a GPU is used

    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError, MemoryBudgetError, DownloadError,
    UsageError.
    """
    from tinychat.hub import store

    options = LoadOptions() if options is None else options
    if not isinstance(options, LoadOptions):
        raise UsageError(f"The options are {arguments.shown(options)}.", "Give a tinychat.LoadOptions.")
    options = LoadOptions.made({**vars(options), **changes})
    if progress is not None and not callable(progress):
        raise UsageError(f"progress is {arguments.shown(progress)}.", "Give a function of one text.")
    arguments.path("The model", model)
    name = str(model)  # as it was given: a path would lose a doubled slash
    path = store.resolve(name, offline=options.offline)
    rendering.prepare()  # beside the weights
    checkpoint = for_embeddings(open_checkpoint(path))
    if isinstance(checkpoint, EmbeddingCheckpoint):
        if options.device == "cuda":
            raise UsageError(f"{name} makes embeddings, which the GPU does not yet.", "Use --device cpu.")
        options = LoadOptions.made({**vars(options), "head_bits": 16})
    checkpoint.config = _for_context(checkpoint.config, options.ctx)
    checkpoint.tokenizer()  # one that is refused is refused before weights are read
    drafts = Drafts(options)
    head = drafts.head(checkpoint.config)
    backend = make_backend(checkpoint, options, progress, head)
    if head is not None and not backend.predicts:
        drafts.has_no_kernels()
    loaded = Model(checkpoint, backend, name, options, drafts)
    loaded.eviction(options.kv_budget, options.kv_policy)  # refuse what cannot work now, not in mid-chat
    if options.think is not None:
        loaded.think(options.think)
    if options.effort is not None:
        loaded.effort(options.effort)
    return loaded


if load.__doc__:  # python -OO has none
    load.__doc__ = f"{inspect.cleandoc(load.__doc__)}\n\nOptions:\n\n{LoadOptions.table()}"


def _for_context(cfg: ModelConfig, ctx: int | None) -> ModelConfig:
    longest = max(cfg.context_length, cfg.long_context)
    if ctx is not None and ctx > longest:
        raise UsageError(
            f"A context of {ctx} tokens is outside what the model was trained for.",
            f"Use --ctx 1 to {longest}.",
        )
    return cfg.for_context(ctx or 1)


def make_backend(
    checkpoint: Checkpoint,
    options: LoadOptions,
    progress: Callable[[str], None] | None = None,
    head: EagleHead | None = None,
) -> Backend:
    """The backend that the options name, loaded; progress as in `load`. head: drafts, where there are kernels
    for it.

    Raises MemoryBudgetError before anything is read if it cannot fit.
    """
    device, kv_bits = options.device, options.kv_bits
    policy = WeightPolicy(options.quantize, options.head_bits)
    if device == "cuda":
        return _cuda(checkpoint, policy, options, progress)
    if device == "auto" and has_gpu():
        try:
            return _cuda(checkpoint, policy, options, progress, proved=True)
        except TinychatError as e:
            warnings.warn(f"The CPU is used: {e.what}", RuntimeWarning, stacklevel=2)
    # Mapped packs can be dropped by the system, but a model larger than memory would crawl.
    _check_room(checkpoint, 4 if device == "reference" else 0.55, available_memory(), head)
    if device == "reference":
        import_torch("The reference device")
        from tinychat.backends.reference import ReferenceBackend

        bits = 32 if kv_bits == 16 else kv_bits
        return ReferenceBackend(checkpoint, policy, options.threads, bits, options.draft == "mtp", head)
    from tinychat.backends.cpu import CpuBackend

    return CpuBackend(
        checkpoint,
        policy,
        threads=options.threads,
        act_bits=options.act_bits,
        kv_bits=kv_bits,
        tell=progress,
        predicts=options.draft in (None, "mtp", "auto"),
        head=head,
    )


def _cuda(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    options: LoadOptions,
    progress: Callable[[str], None] | None,
    proved: bool = False,
) -> Backend:
    """proved: only where the GPU has passed its self-check, which is made now if it was not; and only where
    it is not slower than the CPU.
    """
    from tinychat import fitting
    from tinychat.backends import cuda
    from tinychat.backends.cuda_device import open_modules
    from tinychat.backends.cuda_proof import open_proved

    memories = cuda.refuse_unknown(checkpoint, options.kv_bits)
    modules = open_proved(progress) if proved else open_modules(tell=progress)
    measure = lru_cache(lambda gpu: gpu.measured(modules.device))
    how, gpu = fitting.Fitting(checkpoint, policy, options, memories, measure), fitting.Gpu.of(modules.device)
    likely = how.division(gpu)  # what cannot fit is refused before weights are read
    pack = cuda.opened_pack(checkpoint, policy, progress)
    division = how.division(gpu, pack, likely)
    limit = gpu.limit(options.gpu_memory)
    if fitting.elsewhere(division):
        fitting.check_ram(checkpoint, division)
        rate, alone = how.rate(division, measure(gpu)), how.on_cpu().rate
        if proved and rate and alone and rate < alone:
            raise MemoryBudgetError(
                f"{gpu.name} has no room for all of {checkpoint.path.name}, and would be slower with a part.",
                "Use --device cuda to try.",
            )
        if progress is not None:
            progress(f"{fitting.away(division)}: {human_rate(rate)} tokens a second")
    how_both: dict[str, Any] = {"kv_bits": options.kv_bits, "pack": pack, "limit": limit, "tell": progress}
    if not (division.layers or division.mixtures):
        return cuda.CudaBackend(checkpoint, policy, modules=modules, division=division, **how_both)
    from tinychat.backends.split import SplitBackend

    how_both |= {"threads": options.threads, "act_bits": options.act_bits}
    return SplitBackend(checkpoint, policy, division, modules=modules, **how_both)


def _check_room(
    checkpoint: Checkpoint, bytes_a_weight: float, free: int, head: EagleHead | None = None
) -> None:
    need = (count_weights(checkpoint.config) + (head.n_weights if head else 0)) * bytes_a_weight
    if need + HEADROOM > free:
        raise MemoryBudgetError(
            f"{checkpoint.path.name} needs {human_bytes(need)} beside {human_bytes(HEADROOM)} to work in, "
            f"and {human_bytes(free)} are free.",
            too_large(checkpoint),
        )


def count_weights(cfg: ModelConfig) -> int:
    """Weights of the linears, the embedding and the head."""
    linears = FAMILIES[cfg.family].linears
    body = sum(n * k for layer in range(cfg.n_layers) for n, k in linears(cfg, layer).values())
    beside = outside(FAMILIES[cfg.family], cfg).values()
    body += sum(math.prod(shape) for shape in beside if len(shape) == 2)
    return body + cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)


class Drafts:
    """The draft models of one model, each loaded once, with the options that its own loading was given."""

    def __init__(self, options: LoadOptions):
        self._options, self._draft = options.inherited(), options.draft
        self._loaded: dict[str, Model] = {}
        self._refused: dict[str, TinychatError] = {}
        self._found: dict[str, Path] = {}  # where drafts lie that were looked for already

    def head(self, cfg: ModelConfig) -> EagleHead | None:
        """The head that the options name as the draft, for a model of that shape; None: they name something
        else, or it cannot be used, which is said when the draft is asked for.
        """
        from tinychat.hub import store

        draft = self._draft
        if draft in (None, *WORDS) or draft.startswith("layers:"):
            return None
        try:
            self._found[draft] = store.resolve(draft, offline=self._options.offline)
            head = head_in(self._found[draft])
            if head is not None:
                head.onto(cfg)
            return head
        except ModelNotFoundError:
            return None
        except TinychatError as e:
            self._refused[draft] = e
            return None

    def has_no_kernels(self) -> None:
        """The head cannot be used where the model runs, which is said when it is asked for."""
        self._refused[str(self._draft)] = UsageError(
            f"{self._draft} is an EAGLE-3 head, for which the GPU has no kernels yet.", "Use --device cpu."
        )

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
        facts = model.backend.describe()  # what "auto" came to: drafts must be computed by the same kernels
        options = self._options.but(device=facts["backend"], threads=facts["threads"])
        if not draft.startswith("layers:"):
            return load(self._found.get(draft, draft), options)
        from tinychat.formats.subset import LayerSubset, parse_layers

        part = LayerSubset(model.checkpoint, parse_layers(draft.removeprefix("layers:")))
        return Model(part, make_backend(part, options), draft, options)

    def close(self) -> None:
        """Close them all."""
        for other in self._loaded.values():
            other.close()
