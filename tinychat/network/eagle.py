"""EAGLE-3 (Li et al. 2025): a head that drafts out of hidden states from three places of a model.

Its row i has the embedding of token i and what a linear makes of the model's three states behind token
i - 1, each normed, side by side; for the row of a token that it has guessed itself, its own state behind the
layer stands in place of the three. Queries, keys and values are made of both halves, the residual of the
second. The first row of a text has no state before it, so nobody attends to it.

Names of modules are those of its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.ops import Handle, Ops

if TYPE_CHECKING:
    from tinychat.network.family import WeightSource

LAYER = "midlayer."
ATTENTION = tuple(f"{LAYER}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
MLP = tuple(f"{LAYER}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
NORMS = (f"{LAYER}input_layernorm", f"{LAYER}hidden_norm", f"{LAYER}post_attention_layernorm", "norm")


class Head(Checkpoint, Protocol):
    """A head's files. `ids`: the model's ids of the tokens that it knows, int64; None: they are all."""

    ids: np.ndarray | None

    def onto(self, model: ModelConfig) -> ModelConfig:
        """The config of a model with this head behind its layers. Raises TinychatError where it is not for
        such a model.
        """
        ...


@dataclass(frozen=True)
class Eagle:
    """Weights of a head, as the backend's handles. fuse: a linear for each of its taps, which are summed."""

    embed: Handle | None
    fuse: Sequence[Handle]
    embedding_norm: Handle
    hidden_norm: Handle
    qkv: Handle
    o: Handle
    mlp_norm: Handle
    gate_up: Handle
    down: Handle
    norm: Handle
    head: Handle | None


def fuse_names(taps: Sequence[int]) -> list[str]:
    """Names of the parts of `fc`, of which files hold the columns side by side."""
    return [f"fc.{i}" for i in range(len(taps))]


def linears(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of its linears, embedding and output head. cfg: with the head and its layer."""
    assert cfg.head is not None
    assert cfg.further is not None
    h, a, f = cfg.head.hidden_size, cfg.further.attention, cfg.further.mlp.size
    d = a.head_dim
    shapes = dict.fromkeys(fuse_names(cfg.head.taps), (h, cfg.hidden_size))
    heads = (a.n_heads, a.n_kv_heads, a.n_kv_heads)
    shapes |= {name: (n * d, 2 * h) for name, n in zip(ATTENTION, heads, strict=True)}
    shapes |= {LAYER + "self_attn.o_proj": (h, a.n_heads * d)}
    shapes |= dict(zip(MLP, ((f, h), (f, h), (h, f)), strict=True))
    if cfg.head.own_embedding:
        shapes["embed_tokens"] = (cfg.vocab_size, h)
    if cfg.head.own_head:
        shapes["lm_head"] = (cfg.head.vocab_size, h)
    return shapes


def load(w: WeightSource, cfg: ModelConfig) -> Eagle:
    """Ask the backend's loader `w` for every weight."""
    assert cfg.head is not None
    embedding_norm, hidden_norm, mlp_norm, norm = (w.vector(name) for name in NORMS)
    return Eagle(
        embed=w.embedding("embed_tokens") if cfg.head.own_embedding else None,
        # In floats: residuals have channels so loud that in integers their neighbours would be lost.
        fuse=[w.router(name) for name in fuse_names(cfg.head.taps)],
        embedding_norm=embedding_norm,
        hidden_norm=hidden_norm,
        qkv=w.linear(*ATTENTION),
        o=w.linear(LAYER + "self_attn.o_proj"),
        mlp_norm=mlp_norm,
        gate_up=w.linear(*MLP[:2]),
        down=w.linear(MLP[2]),
        norm=norm,
        head=w.head("lm_head", tied_to=None) if cfg.head.own_head else None,
    )


def tapped(ops: Ops, cfg: ModelConfig, w: Any, x: Handle, layer: int, seen: Handle | None) -> Handle | None:
    """What the head has seen of the model below a layer, with `x`, the layer's input, if it is one of its
    taps. w: the model's weights, the head's as its `further`.
    """
    for tap, fuse in zip(cfg.head.taps, w.further.fuse, strict=True) if cfg.head else ():
        if tap == layer:
            seen = ops.linear(x, fuse, add_to=seen)
    return seen


def remember(ops: Ops, cfg: ModelConfig, w: Any, seen: Handle) -> None:
    """Leave what later guesses see of the step's rows: keys and values, and the fused state of the last."""
    assert cfg.further is not None
    layer, a = cfg.n_layers, cfg.further.attention
    _, k, v = _heads(ops, cfg, w, ops.behind(seen, layer))[1]
    ops.keep(k, v, a, layer)


def predict(ops: Ops, cfg: ModelConfig, w: Any, few: bool = False) -> Handle:
    """Token ids, one of each sequence, to logits of the head's own vocabulary, which is small already."""
    assert cfg.head is not None
    assert cfg.further is not None
    e, head, layer, a = w.further, cfg.head, cfg.n_layers, cfg.further.attention
    x, (q, k, v) = _heads(ops, cfg, w, ops.recall(layer, head.hidden_size))
    x = ops.linear(ops.attention(q, k, v, a, layer), e.o, add_to=x)
    m = ops.rms_norm(x, e.mlp_norm, head.norm_eps)
    x = ops.linear(ops.silu_mul(ops.linear(m, e.gate_up)), e.down, add_to=x)
    ops.leave(x, layer)
    return ops.lm_head(ops.rms_norm(x, e.norm, head.norm_eps), w.head if e.head is None else e.head)


def _heads(ops: Ops, cfg: ModelConfig, w: Any, state: Handle) -> tuple[Handle, tuple[Handle, Handle, Handle]]:
    """The residual, and queries, keys and values. state: that behind the token before, [T, hidden]."""
    assert cfg.head is not None
    assert cfg.further is not None
    e, eps, a = w.further, cfg.head.norm_eps, cfg.further.attention
    embedded = ops.embed(w.embed if e.embed is None else e.embed)
    if cfg.head.normed_residual:
        state = normed = ops.norm_columns(state, e.hidden_norm, eps)
    else:
        normed = ops.rms_norm(state, e.hidden_norm, eps)
    both = ops.join(ops.rms_norm(embedded, e.embedding_norm, eps), normed)
    q, k, v = ops.split_heads(ops.linear(both, e.qkv), a)
    assert a.rope is not None  # a head turns its queries and keys
    q, k = ops.rope(q, k, a.rope)
    return state, (q, k, v)
