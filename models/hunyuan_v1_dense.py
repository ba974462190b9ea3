"""Hunyuan of 2025 without experts: Qwen3 whose queries and keys are normed behind their rotation, so that a
cached key keeps its position (Tencent 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama
from tinychat.models.llama import NAMES, NORM_OFFSET, biases, linears
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _layers(stack: Stack) -> tuple[LayerConfig, ...]:
    a = replace(stack.attention, turnable=False)
    return stack.layers(lambda i: a)


HF = {
    "HunYuanDenseV1ForCausalLM": FromHF(
        {"rms_norm_eps": 1e-5},
        rope_fields=("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        layers=lambda c, stack: _layers(stack),
    ),
}
HEAD_NORMS = {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
GGUF = {"hunyuan-dense": FromGGUF(NAMES | HEAD_NORMS, layers=lambda m, stack: _layers(stack))}


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    q, k = (w.vector(f"{p}self_attn.{name}_layernorm") for name in ("query", "key"))
    return Block(**vars(llama.load_block(w, p, layer)), q_norm=q, k_norm=k)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    if a.rope:
        q, k = ops.rope(q, k, a.rope)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    x = ops.linear(ops.attention(q, k, v, a, layer), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    d, p = cfg.layers[layer].attention.head_dim, f"model.layers.{layer}.self_attn."
    return llama.norms(cfg, layer) | {p + "query_layernorm": (d,), p + "key_layernorm": (d,)}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense"}
