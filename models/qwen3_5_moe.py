"""Qwen3.5 with a mixture of experts: Qwen3.5's layers with Mixtral's experts and Qwen2-MoE's shared one (Qwen
Team 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama, mixtral, qwen2_moe, qwen3_5
from tinychat.models.qwen3_5 import NORM_OFFSET, biases, norms
from tinychat.network import further, hf_config
from tinychat.network.config import LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = [
    "GGUF",
    "HF",
    "NORM_OFFSET",
    "biases",
    "forward",
    "linears",
    "load",
    "norms",
    "predict",
    "settings",
]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    some = hf_config.experts(c, c["moe_intermediate_size"], 256)
    some = replace(some, shared=c["shared_expert_intermediate_size"])
    return tuple(replace(layer, mlp=some) for layer in qwen3_5.layers_from_hf(c, stack))


def layers_from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    """The layers, all with experts."""
    size = m.number("expert_feed_forward_length", stack.mlp.size)
    shared = m.number("expert_shared_feed_forward_length", size)
    some = replace(mixtral.experts_from_gguf(m, size), shared=shared)
    return tuple(replace(layer, mlp=some) for layer in qwen3_5.layers_from_gguf(m, stack))


EXPERT_NAMES = {name: stored for name, stored in mixtral.EXPERT_NAMES.items() if name.startswith("mlp.")}
HF = {
    "Qwen3_5MoeForCausalLM": FromHF(
        qwen3_5.DEFAULTS
        | {
            "intermediate_size": 512,  # of no layer: all have experts
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        hf_config.EXPERTS,
        partial_rope=True,
        layers=_from_hf,
        mixers=("linear_attention",),
        vectors=qwen3_5.KEPT,
        tensors=(*hf_config.WRAPPED, qwen3_5.OWN_NAMES),
        model_type="qwen3_5_moe_text",
        wrappers=("Qwen3_5MoeForConditionalGeneration",),
    )
}
GGUF = {
    "qwen35moe": FromGGUF(
        qwen3_5.GGUF_NAMES | EXPERT_NAMES | qwen2_moe.SHARED_NAMES,
        flat=("mlp.shared_expert_gate",),
        options=("expert_count",),
        layers=layers_from_gguf,
        tensors=qwen3_5.GGUF_OWN,
    )
}


@dataclass(frozen=True)
class Block(qwen3_5.Mixer):
    """Weights of one decoder block, as the backend's handles."""

    mlp_norm: Handle
    experts: mixtral.Experts
    shared: qwen2_moe.Shared


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        **vars(qwen3_5.load_mixer(w, p, layer)),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        experts=mixtral.load_experts(w, p, mixtral.experts_of(layer)),
        shared=qwen2_moe.load_shared(w, p),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x = qwen3_5.mixed(ops, cfg, w, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    x = mixtral.experts(ops, mixtral.experts_of(cfg.layers[layer]), w.experts, m, add_to=x)
    return qwen2_moe.shared(ops, w.shared, m, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block, qwen3_5.keep)


def predict(ops: Ops, cfg: ModelConfig, w: llama.Weights, few: bool = False) -> Handle:
    """Token ids, one of each sequence, to logits, by the layer that predicts further."""
    return further.predict(ops, cfg, w, block, few)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    mlp, p = mixtral.experts_of(cfg.layers[layer]), f"model.layers.{layer}."
    of_all = qwen2_moe.shared_linears(p, cfg.hidden_size, mlp.shared)
    return qwen3_5.mixer_linears(cfg, layer) | mixtral.expert_linears(cfg, layer) | of_all


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    some = mixtral.experts_of(cfg.layers[0])
    mine: Settings = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_experts": some.n,
        "num_experts_per_tok": some.taken,
        "moe_intermediate_size": some.size,
        "shared_expert_intermediate_size": some.shared,
    }
    return qwen3_5.settings(cfg) | mine
