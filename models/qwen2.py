"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (Yang et al. 2024)."""

from __future__ import annotations

from tinychat.models.llama import ATTENTION, forward, linears, load, norms
from tinychat.network.config import ModelConfig

__all__ = ["biases", "forward", "linears", "load", "norms"]


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION[:3]
