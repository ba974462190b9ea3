"""Granite 3.x: Llama with multipliers on embeddings, branches, attention scores and logits (IBM 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinychat.models.llama import NAMES, NORM_OFFSET, Weights, biases, block, linears, load, norms
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _scaled(stack: Stack, scale: float | None) -> tuple[LayerConfig, ...]:
    attention = replace(stack.attention, scale=scale)
    return stack.layers(lambda i: attention)


def constants(c: Settings) -> dict[str, Any]:
    """The multipliers, as ModelConfig has them."""
    return {
        "embed_scale": float(c["embedding_multiplier"]),
        "residual_scale": float(c["residual_multiplier"]),
        "logit_scale": 1 / float(c["logits_scaling"]),
    }


def _from_gguf(m: Metadata) -> dict[str, Any]:
    return {
        "embed_scale": float(m.number("embedding_scale", 0) or 1),
        "residual_scale": float(m.number("residual_scale", 0) or 1),
        "logit_scale": 1 / float(m.number("logit_scale", 0) or 1),
    }


MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")
HF = {
    "GraniteForCausalLM": FromHF(
        dict.fromkeys(MULTIPLIERS, 1.0),
        MULTIPLIERS,
        layers=lambda c, stack: _scaled(stack, float(c["attention_multiplier"])),
        constants=constants,
    )
}
GGUF = {
    "granite": FromGGUF(
        NAMES,
        interleaved=True,
        options=("attention.scale", "embedding_scale", "logit_scale", "residual_scale"),
        layers=lambda m, stack: _scaled(stack, float(m.number("attention.scale", 0)) or None),
        constants=_from_gguf,
    )
}


def forward(ops: Ops, cfg: ModelConfig, w: Weights, block: Callable[..., Handle] = block) -> Handle:
    """Token ids (the step's input) to logits.

    x ← x + r·f(norm(x)) is, for y = x / r, y ← y + f(norm(y)) with the norm's epsilon divided by r²: so the
    residual runs in units of r and its multiplier costs nothing.
    """
    r = cfg.residual_scale
    cfg = replace(cfg, norm_eps=cfg.norm_eps / r**2)
    y = ops.embed(w.embed, cfg.embed_scale / r)
    for layer, weights in enumerate(w.blocks):
        y = block(ops, cfg, weights, y, layer)
    return ops.lm_head(ops.rms_norm(y, w.norm, cfg.norm_eps), w.head, cfg.logit_scale)


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    a = cfg.attentions[0]
    return {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": cfg.embed_scale,
        "residual_multiplier": cfg.residual_scale,
        "attention_multiplier": a.scale or a.head_dim**-0.5,
        "logits_scaling": 1 / cfg.logit_scale,
    }
