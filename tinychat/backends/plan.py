"""What a checkpoint's weights are stored as, what they run as, and the bytes of both: no weight is read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tinychat.backends.exact_form import Kernels
from tinychat.base.machine import human_bytes
from tinychat.models import FAMILIES
from tinychat.network import further
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ExpertsConfig
from tinychat.network.family import outside
from tinychat.network.weight_form import Form
from tinychat.network.weight_policy import WeightPolicy


@dataclass(frozen=True)
class Planned:
    """One linear, or the embedding.

    kind          "embedding", "head", "attention", "mlp", "router" or "experts"
    shape         (out, in)
    form          as stored; the name of a format's own type where `Form` has no words for it
    stored_bytes  as stored
    runs          the form in which a backend stores it
    rounded       whether that holds it less exactly than the file does
    share         part of it that decoding a token reads: of experts as many as are taken, of a table that is
                  no head next to nothing
    """

    kind: str
    shape: tuple[int, int]
    form: Form | str
    stored_bytes: int
    runs: Form
    rounded: bool
    share: float

    @property
    def runs_bytes(self) -> int:
        """Bytes in the form that runs: more than in the file where that packs codes tighter (TQ1_0)."""
        return self.runs.n_bytes(*self.shape)

    @property
    def for_want_of_kernels(self) -> bool:
        """Whether these are codes that are rounded; floats are rounded because they are large."""
        return self.rounded and not (isinstance(self.form, Form) and self.form.is_float)


def plan(checkpoint: Checkpoint, policy: WeightPolicy, kernels: Kernels) -> Iterator[Planned]:
    """Every linear and the embedding, in the order of the layers, as that policy and those kernels run them.

    What depends on the numbers is not known: fp32 scales that halves hold exactly run as halves.
    """
    return (w for _, w in planned(checkpoint, policy, kernels))


def planned(checkpoint: Checkpoint, policy: WeightPolicy, kernels: Kernels) -> Iterator[tuple[str, Planned]]:
    """The same, each with its name."""

    def one(name: str, shape: tuple[int, int], share: float) -> tuple[str, Planned]:
        return name, _planned(checkpoint, policy, kernels, name, shape, share)

    cfg = checkpoint.config
    table = (cfg.vocab_size, cfg.hidden_size)
    linears = FAMILIES[cfg.family].linears
    yield one("model.embed_tokens", table, float(cfg.tie_embeddings))
    for i, layer in enumerate(cfg.layers):
        taken = layer.mlp.taken / layer.mlp.n if isinstance(layer.mlp, ExpertsConfig) else 1.0
        for name, shape in linears(cfg, i).items():
            share = taken if _kind(name) == "experts" else 1.0
            yield one(name, shape, share)
    for name, own in outside(FAMILIES[cfg.family], cfg).items():
        if len(own) == 2:
            share = float(_kind(name) != "embedding")
            yield one(name, (own[0], own[1]), share)
    for name, shape in further.linears(FAMILIES[cfg.family], cfg).items():  # read by drafts alone
        yield one(name, shape, 0.0)
    if not cfg.tie_embeddings:
        yield one("lm_head", table, 1.0)


def too_large(checkpoint: Checkpoint) -> str:
    """What to do where a model does not fit."""
    if not checkpoint.path.exists():  # a benchmark's
        return "Choose a smaller model, or close other programs."
    return f"See what would fit: tinychat show {shlex.quote(str(checkpoint.path))} --fit"


def rounded(checkpoint: Checkpoint, policy: WeightPolicy, kernels: Kernels) -> str | None:
    """A line about codes that these kernels do not read, so that they are rounded; None if there are none."""
    found = [w for w in plan(checkpoint, policy, kernels) if w.for_want_of_kernels]
    if not found:
        return None
    forms = "; ".join(dict.fromkeys(str(w.form) for w in found))
    before, after = sum(w.stored_bytes for w in found), sum(w.runs_bytes for w in found)
    said = f"{human_bytes(before)} of weights run rounded to 8 bits ({human_bytes(after)})"
    return f"{said}, for want of kernels that read {forms}"


def _planned(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    kernels: Kernels,
    name: str,
    shape: tuple[int, int],
    share: float,
) -> Planned:
    form, n_bytes = checkpoint.stored(name)
    kind = _kind(name)
    read = form if isinstance(form, Form) else Form(32, "fp32")  # what has no words is read as floats
    runs, rounded = _runs(policy, kernels, read, kind, shape[1])
    return Planned(kind, shape, form, n_bytes, runs, rounded, share)


@lru_cache(256)  # a mixture has tens of thousands of linears of a few kinds
def _runs(policy: WeightPolicy, kernels: Kernels, read: Form, kind: str, k: int) -> tuple[Form, bool]:
    """Form in which a weight runs, and whether it is rounded."""
    chosen = policy.form(read, k, kind)
    rounded = chosen != read and not (chosen.is_float and chosen.bits >= read.bits)
    return kernels.form(chosen, k), rounded or not kernels.hold(chosen, k)


def _kind(name: str) -> str:
    """Kind of module that a name is of."""
    if name.endswith(("mlp.gate", "mlp.shared_expert_gate", "altup.modality_router")):
        return "router"
    where = {
        "embed_tokens": "embedding",
        "lm_head": "head",
        "self_attn.": "attention",
        "linear_attn.": "attention",
        ".conv.": "attention",
        "mlp.experts.": "experts",
    }
    return next((kind for part, kind in where.items() if part in name), "mlp")
