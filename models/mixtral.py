"""Mixtral: Llama with a choice of MLPs, the experts, in place of one; a router sends each token through the
few that it gives the largest weights (Jiang et al. 2024).

Names are those of transformers' modules, which its files call otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import llama
from tinychat.models.llama import NAMES, NORM_OFFSET, norms
from tinychat.network import hf_config
from tinychat.network.config import ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

ROUTER = "mlp.gate"
BIAS = "mlp.expert_bias"
EXPERT_NAMES = NAMES | {
    ROUTER: "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    mlp = hf_config.experts(c, c["intermediate_size"], 8)
    return tuple(replace(layer, mlp=mlp) for layer in hf_config.windowed(c, stack))


def experts_from_gguf(m: Metadata, size: int) -> ExpertsConfig:
    """The experts of a layer, each of the intermediate size `size`."""
    # llama.cpp makes the weights sum to one, whatever the model was trained with
    normalize = bool(m.get("expert_weights_norm", True))
    return ExpertsConfig(m.number("expert_count"), m.number("expert_used_count"), size, normalize)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    mlp = experts_from_gguf(m, m.number("feed_forward_length"))
    return stack.layers(mlp=lambda i: mlp)


def written(mlp: str) -> tuple[tuple[str, str], ...]:
    """What files call experts whose linears have numbers, in a module of that name (`FromHF.written`)."""
    numbers = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    experts = ((rf"\.mlp\.experts\.(\d+)\.{k}\.", rf".{mlp}.experts.\1.{w}.") for k, w in numbers.items())
    return (r"\.mlp\.gate\.", f".{mlp}.gate."), *experts


HF = {
    "MixtralForCausalLM": FromHF(
        {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
        hf_config.EXPERTS,
        windows=True,
        layers=_from_hf,
        tensors=(
            (r"block_sparse_moe\.gate\.", "mlp.gate."),
            (r"block_sparse_moe\.experts\.(\d+)\.w1\.", r"mlp.experts.\1.gate_proj."),
            (r"block_sparse_moe\.experts\.(\d+)\.w2\.", r"mlp.experts.\1.down_proj."),
            (r"block_sparse_moe\.experts\.(\d+)\.w3\.", r"mlp.experts.\1.up_proj."),
        ),
        written=written("block_sparse_moe"),
    )
}
GGUF = {
    "llama": FromGGUF(
        EXPERT_NAMES,
        when=lambda m: bool(m.get("expert_count")),
        interleaved=True,
        options=("expert_count",),
        layers=_from_gguf,
    )
}


@dataclass(frozen=True)
class Experts:
    """Weights of one layer's experts, as the backend's handles: one of each for each expert."""

    router: Handle
    gate_up: list[Handle]
    down: list[Handle]
    bias: Handle | None = None


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    attn_norm: Handle
    qkv: Handle
    o: Handle
    mlp_norm: Handle
    experts: Experts


def experts_of(layer: LayerConfig) -> ExpertsConfig:
    """The experts of a layer that has them."""
    assert isinstance(layer.mlp, ExpertsConfig)
    return layer.mlp


def into_experts(mlp: ExpertsConfig) -> tuple[str, ...]:
    """The linears of an expert that read what it is given."""
    return ("gate_proj", "up_proj") if mlp.gated else ("up_proj",)


def load_experts(w: WeightSource, p: str, mlp: ExpertsConfig) -> Experts:
    """The experts of the block whose modules' names begin with `p`."""
    names, into = [f"{p}mlp.experts.{e}." for e in range(mlp.n)], into_experts(mlp)
    return Experts(
        router=w.router(p + ROUTER),
        gate_up=[w.linear(*(e + name for name in into)) for e in names],
        down=[w.linear(e + "down_proj") for e in names],
        bias=w.vector(p + BIAS) if mlp.biased else None,
    )


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in llama.ATTENTION[:3])),
        o=w.linear(p + "self_attn.o_proj"),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        experts=load_experts(w, p, experts_of(layer)),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def experts(ops: Ops, mlp: ExpertsConfig, w: Experts, x: Handle, add_to: Handle) -> Handle:
    """The experts that each token takes, weighted and added up. x: [T, hidden], normed."""
    scores = ops.linear(x, w.router)
    rule, groups = (mlp.normalize, mlp.sigmoid, w.bias, mlp.scale), (mlp.groups, mlp.taken_groups)
    routes = ops.route(scores, mlp.taken, *rule, groups=groups)
    h = ops.expert_linear(x, w.gate_up, routes)
    h = ops.silu_mul(h) if mlp.gated else ops.relu_square(h)
    return ops.expert_sum(ops.expert_linear(h, w.down, routes), routes, add_to)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return experts(ops, experts_of(cfg.layers[layer]), w.experts, m, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears, the router among them."""
    shapes = {name: s for name, s in llama.linears(cfg, layer).items() if "self_attn" in name}
    return shapes | expert_linears(cfg, layer)


def expert_linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of the linears of a block's experts, the router among them."""
    mlp, p, h = experts_of(cfg.layers[layer]), f"model.layers.{layer}.", cfg.hidden_size
    shapes, f = {p + ROUTER: (mlp.n, h)}, mlp.size
    for e in range(mlp.n):
        expert = f"{p}mlp.experts.{e}."
        shapes |= {expert + name: (f, h) for name in into_experts(mlp)} | {expert + "down_proj": (h, f)}
    return shapes


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias: none."""
    return ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlp = experts_of(cfg.layers[0])
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": mlp.n,
        "num_experts_per_tok": mlp.taken,
    }
