"""Llama 2/3/3.x, SmolLM2, Mistral: pre-norm decoder with GQA, rotary embedding, RMSNorm and SwiGLU (Touvron
et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.config import ModelConfig
from tinychat.ops import Handle, Ops


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    attn_norm: Handle
    qkv: Handle
    o: Handle
    mlp_norm: Handle
    gate_up: Handle
    down: Handle


@dataclass(frozen=True)
class Weights:
    """Weights of the model, as the backend's handles."""

    embed: Handle
    blocks: list[Block]
    norm: Handle
    head: Handle


def load(w: Any, cfg: ModelConfig) -> Weights:
    """Ask the backend's loader `w` for every weight by its Hugging Face name, in the order of use."""
    embed = w.embedding("model.embed_tokens")
    blocks = []
    for i in range(cfg.n_layers):
        p = f"model.layers.{i}."
        a, m = p + "self_attn.", p + "mlp."
        blocks.append(
            Block(
                attn_norm=w.vector(p + "input_layernorm"),
                qkv=w.linear(a + "q_proj", a + "k_proj", a + "v_proj"),
                o=w.linear(a + "o_proj"),
                mlp_norm=w.vector(p + "post_attention_layernorm"),
                gate_up=w.linear(m + "gate_proj", m + "up_proj"),
                down=w.linear(m + "down_proj"),
            )
        )
    return Weights(embed, blocks, norm=w.vector("model.norm"), head=w.head("lm_head", tied_to=embed))


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), cfg)
    x = ops.linear(ops.attention(*ops.rope(q, k, cfg.rope), v, layer), w.o, add_to=x)
    return ops.linear(
        ops.silu_mul(ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)), w.down, add_to=x
    )


def forward(ops: Ops, cfg: ModelConfig, w: Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    x = ops.embed(w.embed)
    for layer, weights in enumerate(w.blocks):
        x = block(ops, cfg, weights, x, layer)
    return ops.lm_head(ops.rms_norm(x, w.norm, cfg.norm_eps), w.head)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears: what readers check and quantizers quantize."""
    p, d, h, f = f"model.layers.{layer}.", cfg.head_dim, cfg.hidden_size, cfg.intermediate_size
    return {
        p + "self_attn.q_proj": (cfg.n_heads * d, h),
        p + "self_attn.k_proj": (cfg.n_kv_heads * d, h),
        p + "self_attn.v_proj": (cfg.n_kv_heads * d, h),
        p + "self_attn.o_proj": (h, cfg.n_heads * d),
        p + "mlp.gate_proj": (f, h),
        p + "mlp.up_proj": (f, h),
        p + "mlp.down_proj": (h, f),
    }
