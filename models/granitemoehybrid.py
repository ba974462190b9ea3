"""Granite 4: Granite whose layers mix tokens by a state space in place of attention, but for a few without
rope; an MLP that every token takes, in larger models beside experts (IBM 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import granite, llama, mixtral
from tinychat.models.llama import ATTENTION, NORM_OFFSET
from tinychat.network import hf_config, mamba
from tinychat.network.config import DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import MambaConfig

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

INTO, OUT = "shared_mlp.input_linear", "shared_mlp.output_linear"
GATE, UP = "shared_mlp.gate_proj", "shared_mlp.up_proj"  # INTO's halves, which GGUF has apart


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    state = mamba.from_hf(c, int(c["mamba_expand"] * c["hidden_size"]))
    types, position = c.get("layer_types") or ["mamba"] * stack.n, c.get("position_embedding_type")
    if len(types) < stack.n:
        raise ValueError(f"layer_types names {len(types)} layers")
    if position not in (None, "nope", "rope"):
        raise UnsupportedModelError(
            f"Positions of the kind {position!r} are not supported in a Granite.", "Supported: nope, rope."
        )
    attention = replace(stack.attention, scale=float(c["attention_multiplier"]))
    attention = attention if position == "rope" else replace(attention, rope=None)
    mlp: DenseConfig | ExpertsConfig = DenseConfig(c["shared_intermediate_size"])
    if c.get("num_local_experts") or c.get("num_experts"):
        mlp = replace(hf_config.experts(c, c["intermediate_size"], 8), shared=mlp.size)
    return stack.layers(lambda i: state if types[i] in mamba.TYPES else attention, lambda i: mlp)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    heads = m.each("attention.head_count_kv", stack.n)
    attention = replace(stack.attention, scale=float(m.number("attention.scale", 0)) or None)
    attention = attention if m.get("rope.scaling.finetuned", True) else replace(attention, rope=None)
    state = mamba.from_gguf(m, heads.index(0)) if 0 in heads else None
    mlp: DenseConfig | ExpertsConfig = stack.mlp
    if m.number("expert_count", 0):
        mlp = mixtral.experts_from_gguf(m, stack.mlp.size)
        mlp = replace(mlp, shared=m.number("expert_shared_feed_forward_length"))
    return stack.layers(lambda i: attention if heads[i] else state, lambda i: mlp)


HF = {
    "GraniteMoeHybridForCausalLM": FromHF(
        mamba.DEFAULTS
        | dict.fromkeys(granite.MULTIPLIERS, 1.0)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024},
        (*granite.MULTIPLIERS, *hf_config.EXPERTS),
        layers=_from_hf,
        constants=granite.constants,
        mixers=(*mamba.TYPES, "attention"),
        vectors=mamba.KEPT,
        tensors=(
            *mamba.OWN_NAMES,
            (r"\.block_sparse_moe\.router\.(layer\.)?", ".mlp.gate."),
            (
                r"\.block_sparse_moe\.(input_linear\.weight$|experts\.gate_up_proj)",
                ".mlp.experts.gate_up_proj",
            ),
            (r"\.block_sparse_moe\.(output_linear\.weight$|experts\.down_proj)", ".mlp.experts.down_proj"),
        ),
        written=((r"\.mlp\.gate\.", ".block_sparse_moe.router.layer."),),
    )
}
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GGUF = {
    "granitehybrid": replace(
        granite.GGUF["granite"],
        names={k: name for k, name in mixtral.EXPERT_NAMES.items() if k not in _MLP}
        | {
            OUT: "ffn_down",
            GATE: "ffn_gate",
            UP: "ffn_up",
            **{f"mamba.{k}": name for k, name in mamba.GGUF_NAMES.items()},
        },
        options=(*granite.GGUF["granite"].options, "expert_count"),
        layers=_from_gguf,
        tensors=(*mamba.GGUF_OWN, (r"\.ffn_(gate|up|down)_shexp\.", r".ffn_\1.")),
        joined={INTO: (GATE, UP)},
        flattened=("mamba.A_log", "mamba.D", "mamba.norm"),
    )
}


@dataclass(frozen=True)
class Attention:
    """Weights of a layer's attention, as the backend's handles."""

    qkv: Handle
    o: Handle


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    norm: Handle
    mixer: Attention | mamba.Mamba
    mlp_norm: Handle
    experts: mixtral.Experts | None
    gate_up: Handle
    down: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    norm = w.vector(p + "input_layernorm")
    if isinstance(layer.mixer, MambaConfig):
        mixer: Attention | mamba.Mamba = mamba.load(w, p + "mamba.", layer.mixer)
    else:
        mixer = Attention(w.linear(*(p + name for name in ATTENTION[:3])), w.linear(p + ATTENTION[3]))
    return Block(
        norm=norm,
        mixer=mixer,
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        experts=mixtral.load_experts(w, p, layer.mlp) if isinstance(layer.mlp, ExpertsConfig) else None,
        gate_up=w.linear(p + INTO),
        down=w.linear(p + OUT),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def attention(ops: Ops, cfg: ModelConfig, w: Attention, n: Handle, layer: int, add_to: Handle) -> Handle:
    """The attention of n, [T, hidden], normed, added to the residual."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(n, w.qkv), a)
    return ops.linear(llama.attend(ops, a, q, k, v, layer), w.o, add_to=add_to)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int, eps: float) -> Handle:
    """One decoder block. x: [T, hidden], in units of the residual's multiplier; eps: of the norm inside of a
    state-space layer, which has others.
    """
    n, mixer, mlp = ops.rms_norm(x, w.norm, cfg.norm_eps), cfg.layers[layer].mixer, cfg.layers[layer].mlp
    if isinstance(w.mixer, mamba.Mamba):
        assert isinstance(mixer, MambaConfig)
        x = mamba.mixed(ops, mixer, w.mixer, n, layer, eps, add_to=x)
    else:
        x = attention(ops, cfg, w.mixer, n, layer, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    if w.experts is not None:
        assert isinstance(mlp, ExpertsConfig)
        x = mixtral.experts(ops, mlp, w.experts, m, add_to=x)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return granite.forward(ops, cfg, w, partial(block, eps=cfg.norm_eps))


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h, one = f"model.layers.{layer}.", cfg.hidden_size, cfg.layers[layer]
    if isinstance(one.mixer, MambaConfig):
        shapes = mamba.linears(p + "mamba.", h, one.mixer)
    else:
        shapes = {name: s for name, s in llama.linears(cfg, layer).items() if "self_attn" in name}
    if isinstance(one.mlp, ExpertsConfig):
        shapes |= mixtral.expert_linears(cfg, layer)
    f = one.mlp.shared if isinstance(one.mlp, ExpertsConfig) else one.mlp.size
    return shapes | {p + INTO: (2 * f, h), p + OUT: (h, f)}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has."""
    p, mixer = f"model.layers.{layer}.", cfg.layers[layer].mixer
    shapes: dict[str, tuple[int, ...]] = {**llama.norms(cfg, layer)}
    return shapes | (mamba.vectors(p + "mamba.", mixer) if isinstance(mixer, MambaConfig) else {})


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return ATTENTION if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    a, mlp = cfg.attentions[0], cfg.layers[0].mlp
    states = [layer.mixer for layer in cfg.layers if isinstance(layer.mixer, MambaConfig)]
    attends = [not isinstance(layer.mixer, MambaConfig) for layer in cfg.layers]
    mine: dict[str, Any] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "position_embedding_type": "rope" if a.rope else None,
        "layer_types": ["full_attention" if here else "linear_attention" for here in attends],
        "num_local_experts": 0,
        "shared_intermediate_size": mlp.shared if isinstance(mlp, ExpertsConfig) else mlp.size,
    }
    if isinstance(mlp, ExpertsConfig):
        mine |= {"num_local_experts": mlp.n, "num_experts_per_tok": mlp.taken}
    if states:
        mine |= mamba.settings(states[0])
    return granite.settings(cfg) | mine
