"""Gemma 3: Gemma 2 with norms on queries and keys instead of soft caps, and another rope base in windowed
layers (Gemma Team 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.models import gemma2, llama, qwen3
from tinychat.models.gemma2 import NORM_OFFSET, biases, linears, mlp
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["NORM_OFFSET", "biases", "forward", "linears", "load", "norms"]


@dataclass(frozen=True)
class Block(gemma2.Block):
    """Gemma 2's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: Any, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    heads = {name: w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm")}
    return Block(**vars(gemma2.load_block(w, p, layer)), **heads)


def load(w: Any, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].mixer
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    y = ops.linear(ops.attention(*ops.rope(q, k, a.rope), v, a, layer), w.o)
    return mlp(ops, cfg, w, ops.rms_norm(y, w.attn_post_norm, cfg.norm_eps, add_to=x))


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    return gemma2.norms(cfg, layer) | qwen3.head_norms(cfg, layer)
