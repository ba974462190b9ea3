"""SmolLM3: Llama in which some layers do not rotate queries and keys (NoPE; arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from tinychat.models.llama import NAMES, NORM_OFFSET, biases, forward, linears, load, norms
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    rotated = c.get("no_rope_layers")  # 1 where a layer has rope, in spite of its name
    if rotated is None:
        rotated = [(i + 1) % c["no_rope_layer_interval"] for i in range(stack.n)]
    if len(rotated) < stack.n:
        raise ValueError(f"no_rope_layers names {len(rotated)} layers")
    whole, slides = replace(stack.attention, window=0), hf_config.slides(c, lambda i: not rotated[i])

    def attention(i: int) -> AttentionConfig:
        a = stack.attention if slides(i) else whole
        return a if rotated[i] else replace(a, rope=None)

    return stack.layers(attention)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    # llama.cpp has the interval in its code, not in the file
    return stack.layers(lambda i: stack.attention if (i + 1) % 4 else replace(stack.attention, rope=None))


HF = {
    "SmolLM3ForCausalLM": FromHF(
        {
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        ("no_rope_layers",),
        windows=True,
        layers=_from_hf,
    )
}
GGUF = {"smollm3": FromGGUF(NAMES, interleaved=True, layers=_from_gguf)}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    rotated = [int(a.rope is not None) for a in cfg.attentions]
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": rotated,
        **hf_config.windows_of(cfg),
    }
