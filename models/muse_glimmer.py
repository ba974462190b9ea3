"""Muse Glimmer: Gemma's norms on both sides of attention and MLP, embeddings, queries and keys normed without
weights, a sigmoid gate on what attention gives, and windows whose layers alone are rotated (Meta 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tinychat.models import gemma2, llama
from tinychat.models.gemma2 import NORM_OFFSET, norms
from tinychat.models.llama import ATTENTION
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

GATE = "self_attn.gate_proj"


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    def far(i: int) -> bool:
        return (stack.n - 1 - i) % 4 == 0

    thetas, here = c.get("layer_rope_theta"), hf_config.slides(c, lambda i: not far(i))
    if thetas is not None and len(thetas) < stack.n:
        raise ValueError(f"layer_rope_theta names {len(thetas)} layers")
    near = replace(stack.attention, scale=float(c["qk_scale_factor"]) * stack.attention.head_dim**-0.5)

    def attention(i: int) -> AttentionConfig:
        # the list says which layers rotate, the rope how
        rotated = not far(i) if thetas is None else bool(thetas[i])
        a = near if here(i) else replace(near, window=0)
        return a if rotated else replace(a, rope=None)

    return stack.layers(attention)


def _constants(c: Settings) -> dict[str, Any]:
    return {
        "logit_scale": float(c["output_multiplier"]),
        "logit_soft_cap": float(c["final_logit_softcapping"]),
        "post_norm_eps": float(c["post_norm_eps"]),
    }


HF = {
    "MuseGlimmerTextModel": FromHF(
        {
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "hidden_size": 6656,
            "intermediate_size": 19968,
            "num_hidden_layers": 52,
            "vocab_size": 202048,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 2048,
            "final_logit_softcapping": 20.0,
            "qk_scale_factor": 3.87,
            "output_multiplier": 0.19611613513818404,
            "post_norm_eps": 1e-8,
        },
        ("final_logit_softcapping",),
        windows=True,
        activation=("hidden_activation", "silu"),
        layers=_from_hf,
        constants=_constants,
        vectors={"model.norm": Kept()},
        tensors=hf_config.WRAPPED,
        model_type="muse_glimmer_text",
        wrappers=("MuseGlimmerForConditionalGeneration",),
    )
}
GGUF: dict[str, FromGGUF] = {}


@dataclass(frozen=True)
class Block(gemma2.Block):
    """Gemma 2's, and the gate of attention."""

    gate: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(**vars(gemma2.load_block(w, p, layer)), gate=w.linear(p + GATE))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a, behind = cfg.layers[layer].attention, cfg.post_norm_eps
    n = ops.rms_norm(x, w.attn_norm, cfg.norm_eps)
    q, k, v = ops.split_heads(ops.linear(n, w.qkv), a)
    q, k = ops.norm_heads(q, k, None, None, cfg.norm_eps)
    y = ops.sigmoid_mul(llama.attend(ops, a, q, k, v, layer), ops.linear(n, w.gate))
    x = ops.rms_norm(ops.linear(y, w.o), w.attn_post_norm, behind, add_to=x)
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)
    return ops.rms_norm(ops.linear(ops.silu_mul(gate_up), w.down), w.mlp_post_norm, behind, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    x = ops.embed(w.embed, norm_eps=cfg.norm_eps)
    for layer, weights in enumerate(w.blocks):
        x = block(ops, cfg, weights, x, layer)
    n = ops.rms_norm(x, w.norm, cfg.norm_eps)
    return ops.lm_head(n, w.head, cfg.logit_scale, cfg.logit_soft_cap)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    return llama.linears(cfg, layer) | {p + GATE: (a.n_heads * a.head_dim, cfg.hidden_size)}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    a = cfg.layers[0].attention
    return {
        "architectures": ["MuseGlimmerTextModel"],
        "model_type": "muse_glimmer_text",
        "hidden_activation": "silu",
        "layer_types": hf_config.layer_types(cfg),
        "layer_rope_theta": [
            layer.attention.rope.theta if layer.attention.rope else 0 for layer in cfg.layers
        ],
        "qk_scale_factor": (a.scale or 1.0) * a.head_dim**0.5,
        "output_multiplier": cfg.logit_scale,
        "final_logit_softcapping": cfg.logit_soft_cap,
        "post_norm_eps": cfg.post_norm_eps,
    }
