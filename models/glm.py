"""GLM-4 of 2024: Llama that rotates half of each head, neighbouring rows together, with biases on queries,
keys and values and one projection for gate and up (GLM Team 2024).
"""

from __future__ import annotations

from tinychat.models import llama, phi3
from tinychat.models.llama import ATTENTION, NORM_OFFSET, forward, norms
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 0.00000015625,
}
HF = {"GlmForCausalLM": FromHF(DEFAULTS, partial_rope=True, interleaved=True)}
GGUF: dict[str, FromGGUF] = {}  # llama.cpp has these with the three projections in one


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> llama.Block:
    """The block whose modules' names begin with `p`."""
    return llama.Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in ATTENTION[:3])),
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
    mixing = {name: s for name, s in llama.linears(cfg, layer).items() if "self_attn" in name}
    return mixing | {name: s for name, s in phi3.linears(cfg, layer).items() if "mlp" in name}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION[:3] if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["GlmForCausalLM"]}
