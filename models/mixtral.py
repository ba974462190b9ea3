"""Mixtral: Llama with a choice of MLPs, the experts, in place of one; a router sends each token through the
few that it gives the largest weights (Jiang et al. 2024).

Names are those of transformers' modules; readers know what else files call them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.models import llama
from tinychat.models.llama import norms
from tinychat.network.config import ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["biases", "forward", "linears", "load", "norms"]

ROUTER = "mlp.gate"


@dataclass(frozen=True)
class Experts:
    """Weights of one layer's experts, as the backend's handles: one of each for each expert."""

    router: Handle
    gate_up: list[Handle]
    down: list[Handle]


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    attn_norm: Handle
    qkv: Handle
    o: Handle
    mlp_norm: Handle
    experts: Experts


def load_experts(w: Any, p: str, mlp: ExpertsConfig) -> Experts:
    """The experts of the block whose modules' names begin with `p`."""
    names = [f"{p}mlp.experts.{e}." for e in range(mlp.n)]
    return Experts(
        router=w.router(p + ROUTER),
        gate_up=[w.linear(e + "gate_proj", e + "up_proj") for e in names],
        down=[w.linear(e + "down_proj") for e in names],
    )


def load_block(w: Any, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in llama.ATTENTION[:3])),
        o=w.linear(p + "self_attn.o_proj"),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        experts=load_experts(w, p, layer.mlp),
    )


def load(w: Any, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def experts(ops: Ops, mlp: ExpertsConfig, w: Experts, x: Handle, add_to: Handle) -> Handle:
    """The experts that each token takes, weighted and added up. x: [T, hidden], normed."""
    routes = ops.route(ops.linear(x, w.router), mlp.taken, mlp.normalize)
    h = ops.silu_mul(ops.expert_linear(x, w.gate_up, routes))
    return ops.expert_sum(ops.expert_linear(h, w.down, routes), routes, add_to)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].mixer
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(ops.attention(*ops.rope(q, k, a.rope), v, a, layer), w.o, add_to=x)
    return experts(ops, cfg.layers[layer].mlp, w.experts, ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears, the router among them."""
    mlp, p, h = cfg.layers[layer].mlp, f"model.layers.{layer}.", cfg.hidden_size
    shapes = {name: s for name, s in llama.linears(cfg, layer).items() if "self_attn" in name}
    shapes[p + ROUTER] = (mlp.n, h)
    f = mlp.size
    for e in range(mlp.n):
        names = ("gate_proj", "up_proj", "down_proj")
        shapes |= {f"{p}mlp.experts.{e}.{n}": s for n, s in zip(names, ((f, h), (f, h), (h, f)), strict=True)}
    return shapes


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias: none."""
    return ()
