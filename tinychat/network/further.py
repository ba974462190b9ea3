"""The layer that some models have behind all others, which predicts one token further (multi-token
prediction: Gloeckle et al. 2024; DeepSeek-V3, 2024). Such a model drafts by itself.

Its row i has the embedding of token i and the model's last hidden state behind token i - 1, each normed, side
by side. What a projection and a block of the model's own kind make of that is normed and goes to the model's
head: what follows token i. For the row of a token that it has predicted itself, the hidden state is its own.

Its modules have the names that DeepSeek and GLM give them, in a layer behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.ops import Handle, Ops

if TYPE_CHECKING:
    from tinychat.network.family import Family, WeightSource

# Token ids that guesses are made of as long as a text has hardly others: vocabularies merge what is frequent
# first, so most of a text is in the first ids (Zhao et al., FR-Spec, 2025).
FEW = 1 << 16
# What Qwen's files call them.
_QWEN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}
GGUF_NAMES = {
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
}


@dataclass(frozen=True)
class Further:
    """Weights of the layer, as the backend's handles."""

    embedding_norm: Handle
    hidden_norm: Handle
    projection: Handle
    block: Any
    norm: Handle


def prefix(cfg: ModelConfig) -> str:
    """How the names of its modules begin."""
    return f"model.layers.{cfg.n_layers}."


def in_our_words(name: str, cfg: ModelConfig) -> str:
    """Name of a tensor of Qwen's `mtp` as DeepSeek and GLM have it; any other as it is."""
    if not name.startswith("mtp."):
        return name
    module, _, part = name.removeprefix("mtp.").rpartition(".")
    first, _, inside = module.removeprefix("layers.").partition(".")
    if module.startswith("layers.") and first.isdecimal():
        return f"model.layers.{cfg.n_layers + int(first)}.{inside}.{part}"
    return f"{prefix(cfg)}{_QWEN.get(module, module)}.{part}"


def linears(family: Family, cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of its linears; none where there is no such layer."""
    if cfg.further is None:
        return {}
    own = {prefix(cfg) + "eh_proj": (cfg.hidden_size, 2 * cfg.hidden_size)}
    return own | family.linears(cfg.whole, cfg.n_layers)


def norms(family: Family, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else it has."""
    if cfg.further is None:
        return {}
    own = {prefix(cfg) + name: (cfg.hidden_size,) for name in ("enorm", "hnorm", "shared_head.norm")}
    return own | dict(family.norms(cfg.whole, cfg.n_layers))


def found(
    family: Family, cfg: ModelConfig, stored: Collection[str], named: Callable[[str], str]
) -> ModelConfig:
    """The config with the layer, if all that files have behind the model's layers is one such layer, whose
    embedding and head are the model's. It is like the last layer that attends.

    stored: modules that lie there. named: what files call a module.
    """
    attends = [layer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)]
    more = replace(cfg, further=attends[-1])
    needed = {*linears(family, more), *norms(family, more)}
    return more if {named(name) for name in needed} == set(stored) else cfg


LoadBlock = Callable[["WeightSource", str, LayerConfig], Any]
Block = Callable[[Ops, ModelConfig, Any, Handle, int], Handle]
Keep = Callable[[Ops, ModelConfig, Any, Handle, int], None]


def load(w: WeightSource, cfg: ModelConfig, load_block: LoadBlock) -> Further | None:
    """Ask the backend's loader `w` for its weights, if there is such a layer."""
    if cfg.further is None or cfg.head is not None:  # a head comes from elsewhere
        return None
    p = prefix(cfg)
    return Further(
        embedding_norm=w.vector(p + "enorm"),
        hidden_norm=w.vector(p + "hnorm"),
        projection=w.linear(p + "eh_proj"),
        block=load_block(w, p, cfg.further),
        norm=w.vector(p + "shared_head.norm"),
    )


def remember(ops: Ops, cfg: ModelConfig, w: Any, x: Handle, keep: Keep) -> None:
    """Leave what later predictions see of the step's rows: keys and values, and the last hidden state.

    w: the model's weights, `further` among them. x: [T, hidden], behind its last block.
    """
    before = ops.behind(ops.rms_norm(x, w.norm, cfg.norm_eps), cfg.n_layers)
    keep(ops, cfg.whole, w.further.block, _projected(ops, cfg, w, before), cfg.n_layers)


def fewer(cfg: ModelConfig) -> int:
    """How many token ids get logits where few do; 0: all."""
    return FEW if cfg.vocab_size >= 2 * FEW and cfg.head is None else 0


def predict(ops: Ops, cfg: ModelConfig, w: Any, block: Block, few: bool) -> Handle:
    """Token ids, one of each sequence, to logits of what follows them; few: of those that are frequent."""
    x = _projected(ops, cfg, w, ops.recall(cfg.n_layers, cfg.hidden_size))
    x = block(ops, cfg.whole, w.further.block, x, cfg.n_layers)
    ops.leave(ops.rms_norm(x, w.further.norm, cfg.norm_eps), cfg.n_layers)
    n, cap = ops.rms_norm(x, w.further.norm, cfg.norm_eps), cfg.logit_soft_cap
    return ops.lm_head(n, w.head, soft_cap=cap, first=fewer(cfg) if few else 0)


def _projected(ops: Ops, cfg: ModelConfig, w: Any, before: Handle) -> Handle:
    f = w.further
    embedded = ops.rms_norm(ops.embed(w.embed, cfg.embed_scale), f.embedding_norm, cfg.norm_eps)
    return ops.linear(ops.join(embedded, ops.rms_norm(before, f.hidden_norm, cfg.norm_eps)), f.projection)
