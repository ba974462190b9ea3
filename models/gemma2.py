"""Gemma 2: norms before and behind attention and MLP, GELU, scaled embeddings, soft-capped scores and logits,
and every other layer attends to a sliding window (Gemma Team 2024). Windows and caps are in the config:
attention and head see to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tinychat.models import llama
from tinychat.models.llama import NAMES, biases, linears
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

NORM_OFFSET = 1.0
"""Hugging Face's files hold norms as what they differ from one."""

POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
DEFAULTS = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "sliding_window": 4096,
}


def from_hf(
    c: Settings, stack: Stack, otherwise: Callable[[int], bool], **local: Any
) -> tuple[LayerConfig, ...]:
    """Layers of which those that `hf_config.slides` says have the window, and what else is `local`."""
    scaled = replace(stack.attention, scale=float(c["query_pre_attn_scalar"]) ** -0.5)
    scaled = replace(scaled, soft_cap=float(c.get("attn_logit_softcapping") or 0))
    here = hf_config.slides(c, otherwise)
    return _layers(stack, scaled, here, local)


def from_gguf(
    m: Metadata, stack: Stack, period: int, largest: int, soft_cap: float = 0.0, **local: Any
) -> tuple[LayerConfig, ...]:
    """Layers of which each `period`-th sees everything. largest: how many layers the 27B has."""
    period = m.number("attention.sliding_window_pattern", period)
    # the 27B of either generation scales by its hidden size, which only its depth tells
    hidden, heads = m.number("embedding_length"), stack.attention.n_heads
    scale = (hidden / heads) ** -0.5 if stack.n == largest else None
    scaled = replace(stack.attention, scale=scale, soft_cap=soft_cap)
    return _layers(stack, scaled, lambda i: bool((i + 1) % period), local)


def _layers(
    stack: Stack, attention: AttentionConfig, slides: Callable[[int], bool], local: dict[str, Any]
) -> tuple[LayerConfig, ...]:
    near, far = replace(attention, **local), replace(attention, window=0)
    return stack.layers(lambda i: near if slides(i) else far)


def constants_from_hf(c: Settings) -> dict[str, Any]:
    """Factor of the embeddings, and cap of the logits."""
    cap = float(c.get("final_logit_softcapping") or 0)
    return {"embed_scale": math.sqrt(c["hidden_size"]), "logit_soft_cap": cap}


def constants_from_gguf(m: Metadata, soft_cap: float) -> dict[str, Any]:
    """Likewise; soft_cap: where the file is silent."""
    cap = float(m.number("final_logit_softcapping", soft_cap))
    return {"embed_scale": math.sqrt(m.number("embedding_length")), "logit_soft_cap": cap}


HF = {
    "Gemma2ForCausalLM": FromHF(
        DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        windows=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        layers=lambda c, stack: from_hf(c, stack, lambda i: i % 2 == 0),
        constants=constants_from_hf,
    )
}
GGUF = {
    "gemma2": FromGGUF(
        NAMES | POST_NORMS,
        options=("attn_logit_softcapping", "final_logit_softcapping"),
        layers=lambda m, stack: from_gguf(m, stack, 2, 46, float(m.number("attn_logit_softcapping", 50.0))),
        constants=lambda m: constants_from_gguf(m, 30.0),
    )
}


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the norms behind attention and MLP."""

    attn_post_norm: Handle
    mlp_post_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
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


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def mlp(ops: Ops, cfg: ModelConfig, w: Block, x: Handle) -> Handle:
    """The MLP half of a block. x: [T, hidden]."""
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)
    return ops.rms_norm(ops.linear(ops.gelu_mul(gate_up), w.down), w.mlp_post_norm, cfg.norm_eps, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    y = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o)
    return mlp(ops, cfg, w, ops.rms_norm(y, w.attn_post_norm, cfg.norm_eps, add_to=x))


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {f"model.layers.{layer}.{name}_layernorm": (cfg.hidden_size,) for name in names}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    a = cfg.attentions[0]
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round((a.scale or a.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": a.soft_cap or None,
        "final_logit_softcapping": cfg.logit_soft_cap or None,
        "sliding_window": max(a.window for a in cfg.attentions) or cfg.context_length,
        "layer_types": hf_config.layer_types(cfg),
    }
