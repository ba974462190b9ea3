"""Seed-OSS: Llama with wide heads and biases on queries, keys and values (ByteDance Seed 2025)."""

from __future__ import annotations

from tinychat.models.llama import ATTENTION, MLP, NAMES, NORM_OFFSET, forward, linears, load, norms
from tinychat.network.config import ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HF = {
    "SeedOssForCausalLM": FromHF(
        {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
    )
}
GGUF = {
    "seed_oss": FromGGUF(
        NAMES | {"post_attention_layernorm": "post_attention_norm"},
        constants=lambda m: {"attention_bias": True},
    )
}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return (ATTENTION[:3] if cfg.attention_bias else ()) + (MLP if cfg.mlp_bias else ())


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {
        "architectures": ["SeedOssForCausalLM"],
        "model_type": "seed_oss",
    }
