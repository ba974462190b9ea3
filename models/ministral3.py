"""Ministral 3: Llama whose queries grow with the logarithm of their position, beyond the context that it was
first trained with (Mistral AI 2025).
"""

from __future__ import annotations

from dataclasses import replace

from tinychat.models.llama import NAMES, NORM_OFFSET, biases, forward, linears, load, norms
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _sloped(a: AttentionConfig, slope: float) -> AttentionConfig:
    original = a.rope.original_context if a.rope else 1
    return replace(a, slope=slope, original=original) if slope else a


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    scaling = c.get("rope_parameters") or c.get("rope_scaling") or {}
    slope = float(scaling.get("llama_4_scaling_beta") or 0)
    a = _sloped(stack.attention, slope)
    return hf_config.windowed(c, replace(stack, attention=a))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    a = _sloped(stack.attention, float(m.number("attention.temperature_scale", 0.0)))
    return stack.layers(lambda i: a)


HF = {
    "Ministral3ForCausalLM": FromHF(
        {
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
            "rope_parameters": YARN,
        },
        windows=True,
        rope_fields=("llama_4_scaling_beta", "max_position_embeddings"),
        layers=_from_hf,
        tensors=hf_config.WRAPPED,
        model_type="ministral3",
        wrappers=("Mistral3ForConditionalGeneration",),
    )
}
GGUF = {
    "mistral3": FromGGUF(NAMES, interleaved=True, options=("attention.temperature_scale",), layers=_from_gguf)
}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    a, rope = cfg.layers[0].attention, cfg.rope
    given: Settings = {"rope_type": "default", "rope_theta": rope.theta if rope else 1e6}
    if rope is not None and rope.kind == "yarn":
        given |= {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_context,
            "attention_factor": rope.magnitude,
            "llama_4_scaling_beta": a.slope,
        }
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "rope_scaling": None,
        "rope_parameters": given,
    }
