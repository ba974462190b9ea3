"""Qwen3: Llama whose queries and keys are normed head by head before they are rotated (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.models import llama, qwen2
from tinychat.models.llama import NAMES, NORM_OFFSET, biases, linears
from tinychat.network import hf_config
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
HF = {"Qwen3ForCausalLM": FromHF(qwen2.DEFAULTS | {"head_dim": 128}, windows=True, layers=qwen2.layers)}
GGUF = {"qwen3": FromGGUF(NAMES | HEAD_NORMS)}


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    heads = {name: w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm")}
    return Block(**vars(llama.load_block(w, p, layer)), **heads)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def attention(ops: Ops, cfg: ModelConfig, w: Any, x: Handle, layer: int) -> Handle:
    """The attention half of a block that has norms of queries and keys. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    return ops.linear(llama.attend(ops, a, q, k, v, layer), w.o, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x = attention(ops, cfg, w, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    return llama.norms(cfg, layer) | head_norms(cfg, layer)


def head_norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Those of queries and keys."""
    d = cfg.layers[layer].attention.head_dim
    return {f"model.layers.{layer}.self_attn.{name}": (d,) for name in ("q_norm", "k_norm")}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["Qwen3ForCausalLM"], **hf_config.windows_of(cfg)}
