"""OLMo 3: OLMo 2 in which three of four layers attend to a window, and only the others rotate by the scaled
rope (Team OLMo 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tinychat.models import olmo2
from tinychat.models.olmo2 import NORM_OFFSET, biases, forward, linears, load, norms
from tinychat.network import hf_config
from tinychat.network.config import LayerConfig, ModelConfig, RopeConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack
from tinychat.network.hf_rope import rope_config

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _layers(stack: Stack, local: RopeConfig, slides: Callable[[int], bool]) -> tuple[LayerConfig, ...]:
    near, far = replace(stack.attention, rope=local), replace(stack.attention, window=0)
    return stack.layers(lambda i: near if slides(i) else far)


def _every_fourth(i: int) -> bool:
    return bool((i + 1) % 4)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    given = (c.get("rope_parameters") or {}).get("sliding_attention") or {"rope_theta": c.get("rope_theta")}
    local = rope_config({**c, "rope_parameters": given, "rope_scaling": None}, stack.attention.head_dim)
    return _layers(stack, local, hf_config.slides(c, _every_fourth))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    rope = stack.attention.rope or RopeConfig()
    local = RopeConfig(float(m.number("rope.freq_base_swa", rope.theta)), rope.dim)
    return _layers(stack, local, m.flags("attention.sliding_window_pattern", stack.n, _every_fourth))


HF = {
    "Olmo3ForCausalLM": FromHF(
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096}, windows=True, layers=_from_hf
    )
}
GGUF = {
    "olmo2": FromGGUF(
        olmo2.GGUF["olmo2"].names,
        when=lambda m: bool(m.get("attention.sliding_window")),
        options=("attention.sliding_window_pattern",),
        layers=_from_gguf,
    )
}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return {"architectures": ["Olmo3ForCausalLM"], "layer_types": hf_config.layer_types(cfg)}
