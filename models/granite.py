"""Granite 3.x: Llama with multipliers on embeddings, branches, attention scores and logits (IBM 2024)."""

from __future__ import annotations

from dataclasses import replace

from tinychat.models.llama import Weights, biases, block, linears, load, norms
from tinychat.network.config import ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["biases", "forward", "linears", "load", "norms"]


def forward(ops: Ops, cfg: ModelConfig, w: Weights) -> Handle:
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
