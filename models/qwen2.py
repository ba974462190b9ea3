"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (Yang et al. 2024)."""

from __future__ import annotations

from tinychat.models.llama import ATTENTION, NAMES, NORM_OFFSET, forward, linears, load, norms
from tinychat.network import hf_config
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def layers(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    """The last layers have a window, if any."""
    return hf_config.windowed(c, stack, lambda i: i >= c["max_window_layers"])


DEFAULTS = {"use_sliding_window": False, "max_window_layers": 28}
HF = {"Qwen2ForCausalLM": FromHF(DEFAULTS, windows=True, layers=layers)}
GGUF = {"qwen2": FromGGUF(NAMES)}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION[:3]


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["Qwen2ForCausalLM"], **hf_config.windows_of(cfg)}
