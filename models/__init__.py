"""Networks: one file a family, written in the verbs of `tinychat.network.ops`, with all that is particular to
the family: how its files read, what its tensors are called (`tinychat.network.family`).
"""

from __future__ import annotations

from collections.abc import Callable

from tinychat.models import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    exaone4,
    falcon_h1,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    glm,
    glm4,
    glm4_moe_lite,
    gpt_oss,
    granite,
    granite_swa,
    granitemoehybrid,
    hunyuan_v1_dense,
    lfm2,
    lfm2_moe,
    lfm3,
    llama,
    ministral3,
    mixtral,
    muse_glimmer,
    nemotron_h,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from tinychat.network import eagle
from tinychat.network.config import ModelConfig
from tinychat.network.family import Family, Predicting
from tinychat.network.ops import Handle

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "ernie4_5": ernie4_5,
    "exaone4": exaone4,
    "falcon_h1": falcon_h1,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "glm": glm,
    "glm4": glm4,
    "glm4_moe_lite": glm4_moe_lite,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "lfm3": lfm3,
    "granite_swa": granite_swa,
    "granitemoehybrid": granitemoehybrid,
    "hunyuan_v1_dense": hunyuan_v1_dense,
    "llama": llama,
    "ministral3": ministral3,
    "mixtral": mixtral,
    "muse_glimmer": muse_glimmer,
    "nemotron_h": nemotron_h,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
}
"""By `ModelConfig.family`."""

PREDICTING: dict[str, Predicting] = {
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_next": qwen3_next,
}
"""Those of them that know the layer behind the others which predicts one token further."""

UNTAPPED = frozenset(
    (
        *("falcon_h1", "gemma2", "gemma3", "gemma3n", "gemma4"),
        *("granite", "granite_swa", "granitemoehybrid", "muse_glimmer"),
    )
)
"""Those that no head can look into: their residual or embedding is scaled, or there are several of them."""


def predictor(cfg: ModelConfig) -> Callable[..., Handle]:
    """Forward pass of the layer that predicts further: the head's, or that of the family's own layer."""
    return eagle.predict if cfg.head is not None else PREDICTING[cfg.family].predict
