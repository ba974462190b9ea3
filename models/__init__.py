"""Networks: one short file an architecture family, written in the verbs of `tinychat.network.ops`."""

from __future__ import annotations

from types import ModuleType

from tinychat.models import (
    gemma2,
    gemma3,
    granite,
    llama,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)

FAMILIES: dict[str, ModuleType] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "granite": granite,
    "llama": llama,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}
"""Each has `load` and `forward` (the network), `linears`, `norms` and `biases` (what its files hold)."""
