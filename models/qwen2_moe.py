"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with Mixtral's experts, and an expert behind a sigmoid gate that every
token takes (Qwen Team 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama, mixtral, qwen2
from tinychat.models.llama import ATTENTION, NORM_OFFSET, norms
from tinychat.network import hf_config
from tinychat.network.config import DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

SHARED = "mlp.shared_expert."
SHARED_NAMES = {
    SHARED + "gate_proj": "ffn_gate_shexp",
    SHARED + "up_proj": "ffn_up_shexp",
    SHARED + "down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def layers(c: Settings, stack: Stack, experts: ExpertsConfig) -> tuple[LayerConfig, ...]:
    """Layers of which each `decoder_sparse_step`-th has the experts, unless mlp_only_layers names it."""
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"] or ()

    def slides(i: int) -> bool:
        return bool(c["use_sliding_window"] and i % 2 == 0 and i < c["max_window_layers"])

    one = [i in dense or bool((i + 1) % step) for i in range(stack.n)]
    made = hf_config.windowed(c, stack, slides)
    return tuple(layer if one[i] else replace(layer, mlp=experts) for i, layer in enumerate(made))


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    experts = hf_config.experts(c, c["moe_intermediate_size"], 60, bool(c["norm_topk_prob"]))
    return layers(c, stack, replace(experts, shared=c["shared_expert_intermediate_size"]))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    taken = m.number("expert_used_count")
    size = m.number("expert_feed_forward_length", stack.mlp.size // max(1, taken))
    shared = m.number("expert_shared_feed_forward_length", stack.mlp.size)
    normalize = bool(m.get("expert_weights_norm", False))
    mlp = ExpertsConfig(m.number("expert_count"), taken, size, normalize, shared)
    return stack.layers(mlp=lambda i: mlp)


HF = {
    "Qwen2MoeForCausalLM": FromHF(
        qwen2.DEFAULTS
        | {
            "sliding_window": 4096,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "qkv_bias": True,
        },
        hf_config.EXPERTS,
        windows=True,
        layers=_from_hf,
        constants=lambda c: {"attention_bias": bool(c["qkv_bias"])},
    )
}
GGUF = {
    "qwen2moe": FromGGUF(
        mixtral.EXPERT_NAMES | SHARED_NAMES,
        flat=("mlp.shared_expert_gate",),
        options=("expert_count",),
        layers=_from_gguf,
        constants=lambda m: {"attention_bias": True},
    )
}


@dataclass(frozen=True)
class Shared:
    """Weights of the expert that every token takes, as the backend's handles."""

    gate_up: Handle
    down: Handle
    gate: Handle


@dataclass(frozen=True)
class Block(mixtral.Block):
    """Mixtral's, and the expert that every token takes."""

    shared: Shared


def load_shared(w: WeightSource, p: str) -> Shared:
    """The shared expert of the block whose modules' names begin with `p`."""
    return Shared(
        gate_up=w.linear(p + SHARED + "gate_proj", p + SHARED + "up_proj"),
        down=w.linear(p + SHARED + "down_proj"),
        gate=w.router(p + "mlp.shared_expert_gate"),
    )


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block | llama.Block:
    """The block whose modules' names begin with `p`."""
    if isinstance(layer.mlp, DenseConfig):
        return llama.load_block(w, p, layer)
    return Block(**vars(mixtral.load_block(w, p, layer)), shared=load_shared(w, p))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def shared(ops: Ops, w: Shared, m: Handle, add_to: Handle) -> Handle:
    """Result of the shared expert for m [T, hidden], as far as its gate lets it through: that is one factor a
    token, which may as well come before the last linear.
    """
    h = ops.sigmoid_mul(ops.silu_mul(ops.linear(m, w.gate_up)), ops.linear(m, w.gate))
    return ops.linear(h, w.down, add_to=add_to)


def block(ops: Ops, cfg: ModelConfig, w: Block | llama.Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    if not isinstance(w, Block):
        return llama.block(ops, cfg, w, x, layer)
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    x = mixtral.experts(ops, mixtral.experts_of(cfg.layers[layer]), w.experts, m, add_to=x)
    return shared(ops, w.shared, m, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def shared_linears(p: str, hidden: int, size: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a shared expert's linears."""
    return {
        p + SHARED + "gate_proj": (size, hidden),
        p + SHARED + "up_proj": (size, hidden),
        p + SHARED + "down_proj": (hidden, size),
        p + "mlp.shared_expert_gate": (1, hidden),
    }


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    mlp = cfg.layers[layer].mlp
    if isinstance(mlp, DenseConfig):
        return llama.linears(cfg, layer)
    p = f"model.layers.{layer}."
    return mixtral.linears(cfg, layer) | shared_linears(p, cfg.hidden_size, mlp.shared)


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION[:3] if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlps = [layer.mlp for layer in cfg.layers]
    some = next(m for m in mlps if isinstance(m, ExpertsConfig))
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": some.n,
        "num_experts_per_tok": some.taken,
        "moe_intermediate_size": some.size,
        "shared_expert_intermediate_size": some.shared,
        "norm_topk_prob": some.normalize,
        "mlp_only_layers": [i for i, m in enumerate(mlps) if isinstance(m, DenseConfig)],
        "qkv_bias": cfg.attention_bias,
        **hf_config.windows_of(cfg),
    }
