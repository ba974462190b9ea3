"""Networks: one file a family, written in the verbs of `tinychat.network.ops`, with all that is particular to
the family: how its files read, what its tensors are called (`tinychat.network.family`).
"""

from __future__ import annotations

from tinychat.models import (
    ernie4_5,
    exaone4,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    lfm2,
    lfm3,
    llama,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from tinychat.network.family import Family

FAMILIES: dict[str, Family] = {
    "ernie4_5": ernie4_5,
    "exaone4": exaone4,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm": glm,
    "glm4": glm4,
    "granite": granite,
    "lfm2": lfm2,
    "lfm3": lfm3,
    "llama": llama,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
}
"""By `ModelConfig.family`."""
