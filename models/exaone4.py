"""EXAONE 4: OLMo 2's norms behind attention and MLP, queries and keys normed head by head, and in the larger
models windows whose layers alone are rotated (LG AI Research 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tinychat.models import olmo2, qwen3
from tinychat.models.olmo2 import NORM_OFFSET, biases, forward, linears, load
from tinychat.network import hf_config
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _layers(stack: Stack, slides: Callable[[int], bool]) -> tuple[LayerConfig, ...]:
    far = replace(stack.attention, window=0, rope=None)
    return stack.layers(lambda i: stack.attention if slides(i) else far)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    if not c.get("sliding_window"):
        return stack.layers()
    pattern = c.get("sliding_window_pattern") or 4  # a number, or a word like LLLG

    def local(i: int) -> bool:
        return pattern[i % len(pattern)] == "L" if isinstance(pattern, str) else bool((i + 1) % pattern)

    return _layers(stack, hf_config.slides(c, local))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    if not m.get("attention.sliding_window"):
        return stack.layers()
    return _layers(stack, m.flags("attention.sliding_window_pattern", stack.n, lambda i: bool((i + 1) % 4)))


HF = {
    "Exaone4ForCausalLM": FromHF(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        windows=True,
        layers=_from_hf,
    )
}
GGUF = {
    "exaone4": FromGGUF(
        olmo2.GGUF["olmo2"].names, options=("attention.sliding_window_pattern",), layers=_from_gguf
    )
}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    behind = {name: n for name, n in olmo2.norms(cfg, layer).items() if "self_attn" not in name}
    return qwen3.head_norms(cfg, layer) | behind


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    window = max(a.window for a in cfg.attentions) or None
    if any(a.rope is None for a in cfg.attentions):
        window = window or cfg.context_length
    types = ["full_attention" if a.rope is None else "sliding_attention" for a in cfg.attentions]
    return {
        "architectures": ["Exaone4ForCausalLM"],
        "sliding_window": window,
        "layer_types": types if window else ["full_attention"] * cfg.n_layers,
    }
