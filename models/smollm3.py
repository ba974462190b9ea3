"""SmolLM3: Llama in which some layers do not rotate queries and keys (NoPE; arXiv 2501.18795)."""

from __future__ import annotations

from tinychat.models import llama
from tinychat.models.llama import biases, linears, load, mlp, norms
from tinychat.network.config import ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["biases", "forward", "linears", "load", "norms"]


def block(ops: Ops, cfg: ModelConfig, w: llama.Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), cfg)
    if rope := cfg.rope_of(layer):
        q, k = ops.rope(q, k, rope)
    x = ops.linear(ops.attention(q, k, v, layer), w.o, add_to=x)
    return ops.linear(mlp(ops, w, ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)
