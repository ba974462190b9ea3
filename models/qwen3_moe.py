"""Qwen3-MoE: Qwen3's attention with Mixtral's experts; some layers may have one MLP all the same (Yang et al.
2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.models import llama, mixtral, qwen3
from tinychat.models.llama import ATTENTION
from tinychat.models.qwen3 import norms
from tinychat.network.config import DenseConfig, LayerConfig, ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["biases", "forward", "linears", "load", "norms"]


@dataclass(frozen=True)
class Block(mixtral.Block):
    """Mixtral's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: Any, p: str, layer: LayerConfig) -> Block | qwen3.Block:
    """The block whose modules' names begin with `p`."""
    if isinstance(layer.mlp, DenseConfig):
        return qwen3.load_block(w, p, layer)
    heads = {name: w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm")}
    return Block(**vars(mixtral.load_block(w, p, layer)), **heads)


def load(w: Any, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block | qwen3.Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x, mlp = qwen3.attention(ops, cfg, w, x, layer), cfg.layers[layer].mlp
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    if isinstance(mlp, DenseConfig):
        return ops.linear(llama.mlp(ops, w, m), w.down, add_to=x)
    return mixtral.experts(ops, mlp, w.experts, m, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    of = llama if isinstance(cfg.layers[layer].mlp, DenseConfig) else mixtral
    return of.linears(cfg, layer)


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION if cfg.attention_bias else ()
