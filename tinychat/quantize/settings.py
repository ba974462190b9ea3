"""config.json of a model that came in another format: what `tinychat.network.hf_config` reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.network.config import ModelConfig, RopeConfig

Settings = dict[str, Any]


def hf_config(c: ModelConfig) -> Settings:
    """In Hugging Face's vocabulary. Raises UnsupportedModelError where a rope scaling has no name in it."""
    if c.family not in _FAMILIES:
        raise UnsupportedModelError(
            f"A {c.family} model cannot be written as a folder yet.",
            "Quantize its original Hugging Face checkpoint instead.",
        )
    architecture, own = _FAMILIES[c.family]
    if c.family == "llama" and c.windowed:
        architecture = "MistralForCausalLM"
    a, rope = c.layers[0].mixer, c.rope or RopeConfig(dim=c.layers[0].mixer.head_dim)
    config = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.layers[0].mlp.size,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.n_kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.long_context or c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _rope_scaling(rope, c.long_rope),
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "bos_token_id": c.bos_id,
        "eos_token_id": one_or_many(c.eos_ids),
        "use_cache": True,
    }
    if rope.dim != a.head_dim:
        config["partial_rotary_factor"] = rope.dim / a.head_dim
    if c.windowed:
        config["sliding_window"] = _window(c)
    return config | own(c)


def one_or_many(ids: Iterable[int]) -> int | list[int] | None:
    """As Hugging Face writes token ids: none, one, or a list."""
    ids = list(ids)
    return None if not ids else ids[0] if len(ids) == 1 else ids


def _layer_types(c: ModelConfig) -> list[str]:
    return ["sliding_attention" if layer.mixer.window else "full_attention" for layer in c.layers]


def _window(c: ModelConfig) -> int | None:
    return next((layer.mixer.window for layer in c.layers if layer.mixer.window), None)


def _scale(c: ModelConfig) -> float:
    a = c.layers[0].mixer
    return a.scale or a.head_dim**-0.5


def _qwen(c: ModelConfig) -> Settings:
    return {"use_sliding_window": c.windowed} | ({"layer_types": _layer_types(c)} if c.windowed else {})


def _smollm3(c: ModelConfig) -> Settings:
    return _qwen(c) | {"no_rope_layers": [int(layer.mixer.rope is not None) for layer in c.layers]}


def _phi3(c: ModelConfig) -> Settings:
    rope = c.layers[0].mixer.rope
    original = rope.original_context if rope and rope.kind == "longrope" else c.context_length
    return {"original_max_position_embeddings": original, "sliding_window": _window(c)}


def _granite(c: ModelConfig) -> Settings:
    return {
        "embedding_multiplier": c.embed_scale,
        "residual_multiplier": c.residual_scale,
        "attention_multiplier": _scale(c),
        "logits_scaling": 1 / c.logit_scale,
    }


def _gemma2(c: ModelConfig) -> Settings:
    return {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(_scale(c) ** -2),
        "attn_logit_softcapping": c.layers[0].mixer.soft_cap or None,
        "final_logit_softcapping": c.logit_soft_cap or None,
        "sliding_window": _window(c) or c.context_length,
        "layer_types": _layer_types(c),
    }


def _gemma3(c: ModelConfig) -> Settings:
    settings = _gemma2(c) | {"model_type": "gemma3_text"}
    local = [layer.mixer.rope for layer in c.layers if layer.mixer.rope != c.rope]
    settings["rope_local_base_freq"] = local[0].theta if local and local[0] else 1e4
    del settings["attn_logit_softcapping"]
    return settings


_FAMILIES: dict[str, tuple[str, Callable[[ModelConfig], Settings]]] = {
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", _gemma3),
    "granite": ("GraniteForCausalLM", _granite),
    "llama": ("LlamaForCausalLM", lambda c: {}),
    "olmo2": ("Olmo2ForCausalLM", lambda c: {}),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "qwen2": ("Qwen2ForCausalLM", _qwen),
    "qwen3": ("Qwen3ForCausalLM", _qwen),
    "smollm3": ("SmolLM3ForCausalLM", _smollm3),
}


def _rope_scaling(rope: RopeConfig, long: RopeConfig | None = None) -> Settings | None:
    if rope.kind == "none":
        return None
    if rope.kind == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    if rope.kind == "factors":  # GGUF writes llama3 out; the published models use these two
        for factor in (8.0, 32.0):
            llama3 = RopeConfig(rope.theta, rope.dim, "llama3", factor, 1.0, 4.0, 8192)
            if np.allclose(llama3.frequencies(), rope.frequencies(), rtol=1e-4):
                return _rope_scaling(llama3)
        raise UnsupportedModelError(
            "The GGUF's rope factors are not those of Llama 3.1 or 3.2, so config.json cannot name them.",
            "Quantize the original Hugging Face checkpoint instead.",
        )
    if rope.kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_context,
            "attention_factor": rope.magnitude,
        }
    if rope.kind == "longrope":
        return {
            "rope_type": "longrope",
            "short_factor": list(rope.factors),
            "long_factor": list((long or rope).factors),
            "attention_factor": rope.magnitude,
        }
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }
