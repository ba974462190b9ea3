"""GLM-4 of 2025 (GLM-4-0414, GLM-Z1): GLM with norms behind attention and MLP as well (GLM Team 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.models import glm, llama
from tinychat.models.glm import NORM_OFFSET, biases, linears
from tinychat.models.llama import NAMES
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HF = {"Glm4ForCausalLM": FromHF(glm.DEFAULTS, partial_rope=True, interleaved=True)}
OTHERS = {
    "mlp.gate_up_proj": "ffn_up",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
GGUF = {"glm4": FromGGUF(NAMES | OTHERS, interleaved=True)}


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the norms behind attention and MLP."""

    attn_post_norm: Handle
    mlp_post_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        **vars(glm.load_block(w, p, layer)),
        attn_post_norm=w.vector(p + "post_self_attn_layernorm"),
        mlp_post_norm=w.vector(p + "post_mlp_layernorm"),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    y = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o)
    x = ops.rms_norm(y, w.attn_post_norm, cfg.norm_eps, add_to=x)
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)
    return ops.rms_norm(ops.linear(ops.silu_mul(gate_up), w.down), w.mlp_post_norm, cfg.norm_eps, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    p = f"model.layers.{layer}."
    behind = ("post_self_attn_layernorm", "post_mlp_layernorm")
    return llama.norms(cfg, layer) | {p + name: (cfg.hidden_size,) for name in behind}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["Glm4ForCausalLM"]}
