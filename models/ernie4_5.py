"""ERNIE 4.5 without experts: Llama whose files rotate neighbouring rows of a head (Baidu 2025)."""

from __future__ import annotations

from tinychat.models.llama import ATTENTION, MLP, NAMES, NORM_OFFSET, forward, linears, load, norms
from tinychat.network.config import ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

HF = {
    "Ernie4_5ForCausalLM": FromHF(
        {
            "head_dim": 128,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
        constants=lambda c: {"attention_bias": bool(c.get("use_bias")), "mlp_bias": bool(c.get("use_bias"))},
        interleaved=True,
    )
}
HF["Ernie4_5_ForCausalLM"] = HF["Ernie4_5ForCausalLM"]
GGUF = {"ernie4_5": FromGGUF(NAMES, interleaved=True)}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return (*ATTENTION, *MLP) if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {
        "architectures": ["Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5",
        "use_bias": cfg.attention_bias,
    }
