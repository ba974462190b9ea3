"""OLMo 2: norms behind attention and MLP instead of before them, and queries and keys normed over all heads
together (OLMo et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.models import llama, qwen3
from tinychat.models.llama import ATTENTION, NAMES, NORM_OFFSET, biases, linears
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HF = {"Olmo2ForCausalLM": FromHF({"rms_norm_eps": 1e-5})}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF = {"olmo2": FromGGUF(NAMES | qwen3.HEAD_NORMS | POST_NORMS)}


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    qkv: Handle
    q_norm: Handle
    k_norm: Handle
    o: Handle
    attn_norm: Handle
    gate_up: Handle
    down: Handle
    mlp_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        qkv=w.linear(*(p + name for name in ATTENTION[:3])),
        q_norm=w.vector(p + "self_attn.q_norm"),
        k_norm=w.vector(p + "self_attn.k_norm"),
        o=w.linear(p + "self_attn.o_proj"),
        attn_norm=w.vector(p + "post_attention_layernorm"),
        gate_up=w.linear(p + "mlp.gate_proj", p + "mlp.up_proj"),
        down=w.linear(p + "mlp.down_proj"),
        mlp_norm=w.vector(p + "post_feedforward_layernorm"),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One post-norm decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(x, w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    y = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o)
    x = ops.rms_norm(y, w.attn_norm, cfg.norm_eps, add_to=x)
    y = ops.linear(ops.silu_mul(ops.linear(x, w.gate_up)), w.down)
    return ops.rms_norm(y, w.mlp_norm, cfg.norm_eps, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    return {
        p + "self_attn.q_norm": (a.n_heads * a.head_dim,),
        p + "self_attn.k_norm": (a.n_kv_heads * a.head_dim,),
        p + "post_attention_layernorm": (cfg.hidden_size,),
        p + "post_feedforward_layernorm": (cfg.hidden_size,),
    }


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["Olmo2ForCausalLM"]}
