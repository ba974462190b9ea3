"""config.json of a model that came in another format: what `tinychat.network.hf_config` reads back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.hf import read_config
from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig, RopeConfig

Settings = dict[str, Any]


def hf_config(c: ModelConfig) -> Settings:
    """Settings in Hugging Face's vocabulary. Raises UnsupportedModelError where a rope scaling has no name in
    it.
    """
    a = c.attentions[0]
    rope = c.rope or RopeConfig(dim=a.head_dim)
    config: Settings = {
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
    if window := max(a.window for a in c.attentions):
        config["sliding_window"] = window
    config |= FAMILIES[c.family].settings(c)
    (architecture,) = config["architectures"]
    _check_ropes(c, config)
    return {"model_type": architecture.removesuffix("ForCausalLM").lower()} | config


def _check_ropes(c: ModelConfig, config: Settings) -> None:
    """Raises UnsupportedModelError where the settings say other ropes than the config has."""
    for there, here in zip(read_config(config).layers, c.layers, strict=True):
        a, b = (getattr(layer.mixer, "rope", None) for layer in (there, here))
        if (a is None) != (b is None) or (a and b and not _alike(a, b)):
            raise UnsupportedModelError(
                "The GGUF's rope scaling has no words in config.json.",
                "Quantize the original Hugging Face checkpoint instead.",
            )


def _alike(a: RopeConfig, b: RopeConfig) -> bool:
    return a.dim == b.dim and np.allclose(a.frequencies(), b.frequencies(), rtol=1e-4)


def one_or_many(ids: Iterable[int]) -> int | list[int] | None:
    """Token ids as Hugging Face writes them: none, one, or a list."""
    ids = list(ids)
    return None if not ids else ids[0] if len(ids) == 1 else ids


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
