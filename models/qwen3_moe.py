"""Qwen3-MoE: Qwen3's attention with Mixtral's experts; some layers may have one MLP all the same (Yang et al.
2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama, mixtral, qwen3
from tinychat.models.llama import ATTENTION, NORM_OFFSET
from tinychat.models.qwen3 import norms
from tinychat.network import hf_config
from tinychat.network.config import DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"] or ()
    some = hf_config.experts(c, c["moe_intermediate_size"], 128, bool(c["norm_topk_prob"]))
    layers = hf_config.windowed(c, stack, lambda i: c["use_sliding_window"])
    one = [i in dense or bool((i + 1) % step) for i in range(stack.n)]
    return tuple(layer if one[i] else replace(layer, mlp=some) for i, layer in enumerate(layers))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    mlp = mixtral.experts_from_gguf(m, m.number("expert_feed_forward_length"))
    return stack.layers(mlp=lambda i: mlp)


HF = {
    "Qwen3MoeForCausalLM": FromHF(
        {
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        hf_config.EXPERTS,
        windows=True,
        layers=_from_hf,
    )
}
GGUF = {
    "qwen3moe": FromGGUF(
        mixtral.EXPERT_NAMES | qwen3.HEAD_NORMS, options=("expert_count",), layers=_from_gguf
    )
}


@dataclass(frozen=True)
class Block(mixtral.Block):
    """Mixtral's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block | qwen3.Block:
    """The block whose modules' names begin with `p`."""
    if isinstance(layer.mlp, DenseConfig):
        return qwen3.load_block(w, p, layer)
    heads = {name: w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm")}
    return Block(**vars(mixtral.load_block(w, p, layer)), **heads)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block | qwen3.Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x = qwen3.attention(ops, cfg, w, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    if isinstance(w, Block):
        return mixtral.experts(ops, mixtral.experts_of(cfg.layers[layer]), w.experts, m, add_to=x)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    of = llama if isinstance(cfg.layers[layer].mlp, DenseConfig) else mixtral
    return of.linears(cfg, layer)


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlps = [layer.mlp for layer in cfg.layers]
    some = next(m for m in mlps if isinstance(m, ExpertsConfig))
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": some.n,
        "num_experts_per_tok": some.taken,
        "moe_intermediate_size": some.size,
        "norm_topk_prob": some.normalize,
        "mlp_only_layers": [i for i, m in enumerate(mlps) if isinstance(m, DenseConfig)],
        **hf_config.windows_of(cfg),
    }
