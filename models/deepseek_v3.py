"""DeepSeek-V3 and R1: DeepSeek-V2 whose experts are chosen by sigmoids and a bias that keeps them all busy
(DeepSeek-AI 2024).
"""

from __future__ import annotations

from dataclasses import replace

from tinychat.models import deepseek_v2, mixtral
from tinychat.models.deepseek_v2 import NORM_OFFSET, biases, forward, linears, load, norms
from tinychat.network.config import ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromHF, Kept, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

BIAS_NAME = (r"\.mlp\.gate\.e_score_correction_bias$", f".{mixtral.BIAS}.weight")
BIAS_WRITTEN = (rf"\.{mixtral.BIAS}\.weight$", ".mlp.gate.e_score_correction_bias")


def experts_from_hf(c: Settings) -> ExpertsConfig:
    """The experts of a layer."""
    return replace(
        deepseek_v2.experts_from_hf(c),
        normalize=bool(c["norm_topk_prob"]),
        sigmoid=True,
        biased=True,
        groups=c["n_group"],
        taken_groups=c["topk_group"],
    )


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    a, some, dense = deepseek_v2.attention_from_hf(c, stack), experts_from_hf(c), c["first_k_dense_replace"]
    return stack.layers(lambda i: a, lambda i: stack.mlp if i < dense else some)


HF = {
    "DeepseekV3ForCausalLM": FromHF(
        deepseek_v2.DEFAULTS
        | {
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
        },
        (*deepseek_v2.OPTIONS, "scoring_func"),
        partial_rope=True,
        layers=_from_hf,
        vectors={mixtral.BIAS: Kept()},
        tensors=(BIAS_NAME,),
        written=(BIAS_WRITTEN,),
        parts=deepseek_v2.PARTS,
        head_dim="qk_rope_head_dim",
    )
}
# Files of early 2025, whatever model they hold, have what makes keys and values in one tensor.
GGUF = {
    "deepseek2": replace(
        deepseek_v2.GGUF["deepseek2"],
        when=lambda m: bool(m.shape("blk.0.attn_kv_b.weight")),
        parts=deepseek_v2.PARTS,
    )
}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    return deepseek_v2.latent_settings(cfg) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
    }
