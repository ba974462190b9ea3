"""GLM-4.7-Flash: DeepSeek-V3's network with other sizes; each layer says whether it has experts
(Z.ai 2026).
"""

from __future__ import annotations

from tinychat.models import deepseek_v2, deepseek_v3, mixtral
from tinychat.models.deepseek_v2 import NORM_OFFSET, biases, forward, linears, load, norms
from tinychat.network.config import ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Settings, Stack

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    a, some = deepseek_v2.attention_from_hf(c, stack), deepseek_v3.experts_from_hf(c)
    types = c["mlp_layer_types"] or ["dense"] + ["sparse"] * (stack.n - 1)
    if not set(types) <= {"dense", "sparse"} or len(types) < stack.n:
        raise ValueError(f"mlp_layer_types is {types!r}")
    return stack.layers(lambda i: a, lambda i: some if types[i] == "sparse" else stack.mlp)


HF = {
    "Glm4MoeLiteForCausalLM": FromHF(
        deepseek_v2.DEFAULTS
        | {
            "mlp_layer_types": None,
            "moe_intermediate_size": 1536,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 4,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 1.8,
            "scoring_func": "sigmoid",
            "topk_group": 1,
            "v_head_dim": 256,
        },
        (*deepseek_v2.OPTIONS, "scoring_func"),
        partial_rope=True,
        layers=_from_hf,
        vectors={mixtral.BIAS: Kept()},
        tensors=(deepseek_v3.BIAS_NAME,),
        written=(deepseek_v3.BIAS_WRITTEN,),
        parts=deepseek_v2.PARTS,
        head_dim="qk_rope_head_dim",
    )
}
GGUF: dict[str, FromGGUF] = {}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    sparse = [isinstance(layer.mlp, ExpertsConfig) for layer in cfg.layers]
    return deepseek_v2.latent_settings(cfg) | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "mlp_layer_types": ["sparse" if some else "dense" for some in sparse],
    }
