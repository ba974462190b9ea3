"""Phi-3, Phi-3.5 mini, Phi-4 and Phi-4-mini: Llama with fused projections (Abdin et al. 2024)."""

from __future__ import annotations

from tinychat.models import llama
from tinychat.models.llama import NAMES, NORM_OFFSET, forward, norms
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HF = {
    "Phi3ForCausalLM": FromHF(
        {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}, windows=True, partial_rope=True
    )
}
GGUF = {"phi3": FromGGUF(NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"})}


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> llama.Block:
    """The block whose modules' names begin with `p`."""
    return llama.Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(p + "self_attn.qkv_proj"),
        o=w.linear(p + "self_attn.o_proj"),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        gate_up=w.linear(p + "mlp.gate_up_proj"),
        down=w.linear(p + "mlp.down_proj"),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    h, f = cfg.hidden_size, cfg.layers[layer].mlp.size
    return {
        p + "self_attn.qkv_proj": ((a.n_heads + 2 * a.n_kv_heads) * a.head_dim, h),
        p + "self_attn.o_proj": (h, a.n_heads * a.head_dim),
        p + "mlp.gate_up_proj": (2 * f, h),
        p + "mlp.down_proj": (h, f),
    }


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias: none."""
    return ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    rope = cfg.rope
    original = rope.original_context if rope and rope.kind == "longrope" else cfg.context_length
    window = max(a.window for a in cfg.attentions) or None
    return {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": original,
        "sliding_window": window,
    }
