"""LFM2-MoE: LFM2 whose layers behind the first few have Mixtral's experts, chosen by sigmoids and a bias that
keeps them all busy (Liquid AI 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import lfm2, llama, mixtral
from tinychat.models.lfm2 import NORM_OFFSET, biases
from tinychat.network import hf_config
from tinychat.network.config import DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    some = replace(
        hf_config.experts(c, c["moe_intermediate_size"], 32, bool(c["norm_topk_prob"])),
        sigmoid=True,
        biased=bool(c["use_expert_bias"]),
        scale=float(c["routed_scaling_factor"]),
    )
    layers = lfm2.layers_from_hf(c, stack)
    return tuple(x if i < c["num_dense_layers"] else replace(x, mlp=some) for i, x in enumerate(layers))


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    some = replace(
        mixtral.experts_from_gguf(m, m.number("expert_feed_forward_length")),
        sigmoid=True,
        biased=True,
        scale=float(m.number("expert_weights_scale", 0.0)) or 1.0,
    )
    dense, layers = m.number("leading_dense_block_count", 0), lfm2.layers_from_gguf(m, stack)
    return tuple(x if i < dense else replace(x, mlp=some) for i, x in enumerate(layers))


EXPERTS = (
    (r"\.feed_forward\.gate\.", ".mlp.gate."),
    (r"\.feed_forward\.expert_bias$", ".mlp.expert_bias.weight"),
    (r"\.feed_forward\.experts\.(gate_up_proj|down_proj)", r".mlp.experts.\1"),
    (r"\.feed_forward\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
    (r"\.feed_forward\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
    (r"\.feed_forward\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
)
EXPERT_NAMES = {name: stored for name, stored in mixtral.EXPERT_NAMES.items() if name.startswith("mlp.")}
HF = {
    "Lfm2MoeForCausalLM": FromHF(
        lfm2.DEFAULTS
        | {
            "num_dense_layers": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        hf_config.EXPERTS,
        layers=_from_hf,
        constants=lfm2.constants,
        mixers=("conv",),
        vectors=lfm2.KEPT | {mixtral.BIAS: Kept()},
        tensors=(lfm2.LAST_NORM, *EXPERTS),
        written=(
            lfm2.LAST_WRITTEN,
            *mixtral.written("feed_forward"),
            (r"\.mlp\.expert_bias\.weight$", ".feed_forward.expert_bias"),
        ),
    )
}
GGUF = {
    "lfm2moe": FromGGUF(
        lfm2.NAMES | EXPERT_NAMES | {mixtral.BIAS: "exp_probs_b"},
        options=("expert_count", "expert_gating_func", "expert_weights_scale"),
        layers=_from_gguf,
        tensors=((r"\.exp_probs_b\.bias$", ".exp_probs_b.weight"),),
    )
}


@dataclass(frozen=True)
class Block:
    """Weights of a block with experts, as the backend's handles."""

    mixer: lfm2.Attention | lfm2.Conv
    mlp_norm: Handle
    experts: mixtral.Experts


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block | lfm2.Block:
    """The block whose modules' names begin with `p`."""
    if isinstance(layer.mlp, DenseConfig):
        return lfm2.load_block(w, p, layer)
    mixer, norm = lfm2.load_mixer(w, p, layer), w.vector(p + "ffn_norm")
    return Block(mixer, norm, mixtral.load_experts(w, p, layer.mlp))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block | lfm2.Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    if isinstance(w, lfm2.Block):
        return lfm2.block(ops, cfg, w, x, layer)
    x = lfm2.mixed(ops, cfg, w.mixer, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return mixtral.experts(ops, mixtral.experts_of(cfg.layers[layer]), w.experts, m, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    if isinstance(cfg.layers[layer].mlp, DenseConfig):
        return lfm2.linears(cfg, layer)
    return lfm2.mixer_linears(cfg, layer) | mixtral.expert_linears(cfg, layer)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has."""
    mlp, own = cfg.layers[layer].mlp, lfm2.norms(cfg, layer)
    if isinstance(mlp, ExpertsConfig) and mlp.biased:
        own |= {f"model.layers.{layer}.{mixtral.BIAS}": (mlp.n,)}
    return own


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlps = [layer.mlp for layer in cfg.layers]
    some = next(m for m in mlps if isinstance(m, ExpertsConfig))
    mine: Settings = {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "num_experts": some.n,
        "num_experts_per_tok": some.taken,
        "moe_intermediate_size": some.size,
        "norm_topk_prob": some.normalize,
        "use_expert_bias": some.biased,
        "routed_scaling_factor": some.scale,
        "num_dense_layers": sum(isinstance(m, DenseConfig) for m in mlps),
    }
    return mine | lfm2.mixer_settings(cfg)
