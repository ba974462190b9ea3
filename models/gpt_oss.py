"""gpt-oss: Mixtral's experts with biases and clamped gates, a window in every second layer, and for each head
a sink, one more score that takes its share of the attention (OpenAI 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama, mixtral
from tinychat.models.llama import ATTENTION, NORM_OFFSET
from tinychat.models.mixtral import linears
from tinychat.network import hf_config
from tinychat.network.config import ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.hf_rope import yarn_factors
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

SINKS = "self_attn.sinks"
LIMIT, ALPHA = 7.0, 1.702
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _every_second(i: int) -> bool:
    return i % 2 == 0


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    mlp = hf_config.experts(c, c["intermediate_size"], 128)
    mlp = replace(mlp, limit=float(c["swiglu_limit"]), alpha=float(c["swiglu_alpha"]))
    return tuple(replace(layer, mlp=mlp) for layer in hf_config.windowed(c, stack, _every_second))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    size, n, taken = (m.number(f"expert_{key}") for key in ("feed_forward_length", "count", "used_count"))
    mlp = ExpertsConfig(n, taken, size, limit=LIMIT, alpha=ALPHA)
    slides = m.flags("attention.sliding_window_pattern", stack.n, _every_second)
    near, rope = stack.attention, stack.attention.rope
    if rope is not None and rope.kind == "yarn":  # its ramp ends between two dimensions, as GGUF does not say
        exact = yarn_factors(rope.theta, rope.dim, rope.factor, rope.original_context, truncate=False)
        near = replace(near, rope=replace(rope, factors=exact))
    far = replace(near, window=0)
    return stack.layers(lambda i: near if slides(i) else far, lambda i: mlp)


HF = {
    "GptOssForCausalLM": FromHF(
        {
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": YARN,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "swiglu_alpha": ALPHA,
            "swiglu_limit": LIMIT,
        },
        hf_config.EXPERTS,
        windows=True,
        layers=_from_hf,
        tensors=((r"\.mlp\.router\.", ".mlp.gate."), (r"\.sinks$", ".sinks.weight")),
        vectors={SINKS: Kept(part="")},
    )
}
GGUF = {
    "gpt-oss": FromGGUF(
        mixtral.EXPERT_NAMES | {SINKS: "attn_sinks", "post_attention_layernorm": "post_attention_norm"},
        options=("expert_count",),
        layers=_from_gguf,
    )
}


@dataclass(frozen=True)
class Block(mixtral.Block):
    """Mixtral's, and the sinks of the heads."""

    sinks: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(**vars(mixtral.load_block(w, p, layer)), sinks=w.vector(p + SINKS))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    a, mlp, experts = cfg.layers[layer].attention, mixtral.experts_of(cfg.layers[layer]), w.experts
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(llama.attend(ops, a, q, k, v, layer, w.sinks), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    # the softmax of the scores of those taken: that of all, made to sum to one
    routes = ops.route(ops.linear(m, experts.router), mlp.taken, mlp.normalize)
    h = ops.clamped_mul(ops.expert_linear(m, experts.gate_up, routes), mlp.limit, mlp.alpha)
    return ops.expert_sum(ops.expert_linear(h, experts.down, routes), routes, x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors, the sinks among them."""
    return llama.norms(cfg, layer) | {f"model.layers.{layer}.{SINKS}": (cfg.layers[layer].attention.n_heads,)}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by the ends of their names: those of experts, the router, attention."""
    experts = (mixtral.ROUTER, "gate_proj", "up_proj", "down_proj")
    return (*experts, *ATTENTION) if cfg.attention_bias else experts


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlp, rope = mixtral.experts_of(cfg.layers[0]), cfg.rope
    scaling: Settings = {}
    if rope is not None and rope.kind == "yarn":
        own = {"factor": rope.factor, "original_max_position_embeddings": rope.original_context}
        scaling["rope_scaling"] = {**YARN, **own, "rope_theta": rope.theta}
    return {
        **scaling,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": mlp.n,
        "num_experts_per_tok": mlp.taken,
        "layer_types": hf_config.layer_types(cfg),
        "swiglu_limit": mlp.limit,
        "swiglu_alpha": mlp.alpha,
    }
