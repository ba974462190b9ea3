"""Gemma 2: norms before and behind attention and MLP, GELU, scaled embeddings, soft-capped scores and logits,
and every other layer attends to a sliding window (Gemma Team 2024). Windows and caps are in the config:
attention and head see to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.models import llama
from tinychat.models.llama import biases, linears
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["NORM_OFFSET", "biases", "forward", "linears", "load", "norms"]

NORM_OFFSET = 1.0
"""Hugging Face's files hold norms as what they differ from one."""


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the norms behind attention and MLP."""

    attn_post_norm: Handle
    mlp_post_norm: Handle


def load_block(w: Any, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in llama.ATTENTION[:3])),
        o=w.linear(p + "self_attn.o_proj"),
        attn_post_norm=w.vector(p + "post_attention_layernorm"),
        mlp_norm=w.vector(p + "pre_feedforward_layernorm"),
        gate_up=w.linear(p + "mlp.gate_proj", p + "mlp.up_proj"),
        down=w.linear(p + "mlp.down_proj"),
        mlp_post_norm=w.vector(p + "post_feedforward_layernorm"),
    )


def load(w: Any, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def mlp(ops: Ops, cfg: ModelConfig, w: Block, x: Handle) -> Handle:
    """The MLP half of a block. x: [T, hidden]."""
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)
    return ops.rms_norm(ops.linear(ops.gelu_mul(gate_up), w.down), w.mlp_post_norm, cfg.norm_eps, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].mixer
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    y = ops.linear(ops.attention(*ops.rope(q, k, a.rope), v, a, layer), w.o)
    return mlp(ops, cfg, w, ops.rms_norm(y, w.attn_post_norm, cfg.norm_eps, add_to=x))


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {f"model.layers.{layer}.{name}_layernorm": (cfg.hidden_size,) for name in names}
