"""Experts of Gemma 4: beside a block's MLP, chosen by a router with a norm of its own, each with a factor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat.models import gemma2, mixtral
from tinychat.network.config import ExpertsConfig, ModelConfig
from tinychat.network.family import WeightSource
from tinychat.network.ops import Handle, Ops

ROUTER_NORM, EXPERT_SCALE = "router.scale", "router.per_expert_scale"
DENSE_NORM, EXPERTS_NORM, EXPERTS_POST_NORM = (
    f"{name}forward_layernorm_{i}" for name, i in (("post_feed", 1), ("pre_feed", 2), ("post_feed", 2))
)


def router_norm(scale: np.ndarray) -> np.ndarray:
    """The router's norm: what files hold is divided by √hidden besides."""
    return scale * np.float32(len(scale) ** -0.5)


@dataclass(frozen=True)
class Routed:
    """Experts beside a block's MLP, each expert's factor, and the norms of and behind both."""

    experts: mixtral.Experts
    router_norm: Handle
    each: Handle
    dense_norm: Handle
    norm: Handle
    post_norm: Handle


def load_routed(w: WeightSource, p: str, mlp: ExpertsConfig) -> Routed:
    """The experts of the block whose modules' names begin with `p`, and what belongs to them."""
    vectors = (ROUTER_NORM, EXPERT_SCALE, DENSE_NORM, EXPERTS_NORM, EXPERTS_POST_NORM)
    return Routed(mixtral.load_experts(w, p, mlp), *(w.vector(p + name) for name in vectors))


def mlp_and_experts(
    ops: Ops, cfg: ModelConfig, w: gemma2.Block, r: Routed, x: Handle, mlp: ExpertsConfig
) -> Handle:
    """The MLP half of a block with experts beside its MLP, both of the residual x [T, hidden]."""
    eps = cfg.norm_eps
    dense = ops.linear(ops.gelu_mul(ops.linear(ops.rms_norm(x, w.mlp_norm, eps), w.gate_up)), w.down)
    scores = ops.linear(ops.rms_norm(x, r.router_norm, eps), r.experts.router)
    routes = ops.route(scores, mlp.taken, mlp.normalize, each=r.each)
    h = ops.gelu_mul(ops.expert_linear(ops.rms_norm(x, r.norm, eps), r.experts.gate_up, routes))
    y = ops.expert_sum(ops.expert_linear(h, r.experts.down, routes), routes)
    y = ops.rms_norm(y, r.post_norm, eps, add_to=ops.norm_columns(dense, r.dense_norm, eps))
    return ops.rms_norm(y, w.mlp_post_norm, eps, add_to=x)


def vectors(cfg: ModelConfig, p: str, mlp: ExpertsConfig) -> dict[str, tuple[int, ...]]:
    """Names and [n] of a block's vectors that belong to its experts."""
    hidden = (ROUTER_NORM, DENSE_NORM, EXPERTS_NORM, EXPERTS_POST_NORM)
    return {**{p + name: (cfg.hidden_size,) for name in hidden}, p + EXPERT_SCALE: (mlp.n,)}
