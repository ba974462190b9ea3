"""Nemotron-H: every block is one thing alone, a state-space layer, attention without rope, an MLP of
max(x, 0)² without gates, or experts of that kind (NVIDIA 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import llama, mixtral
from tinychat.models.llama import NORM_OFFSET
from tinychat.network import mamba
from tinychat.network.config import (
    NO_MLP,
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
)
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import MambaConfig

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
BEFORE = {"mamba": "linear_attention", "attention": "full_attention"}
LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
DEFAULTS: Settings = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_limit": mamba.DEFAULTS["time_step_limit"],
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "layer_norm_epsilon": 1e-5,
}
QKV = ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")
OUT, UP, DOWN = "mixer.o_proj", "mixer.up_proj", "mixer.down_proj"
SHARED = ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj")


def _said(c: Settings) -> Settings:
    """The settings, with what other families' files say under other names."""
    given = next(
        (c[name] for name in LISTS if c.get(name)), ["linear_attention", "moe", "full_attention", "mlp"]
    )
    known = BEFORE | {kind: kind for kind in KINDS.values()}
    named = [KINDS.get(kind, kind) if isinstance(given, str) else known.get(kind, kind) for kind in given]
    for kind in named:
        if kind not in KINDS.values():
            raise UnsupportedModelError(
                f"Layers of the type {kind!r} are not supported in a NemotronHForCausalLM.",
                f"Supported: {', '.join(KINDS.values())}.",
            )
    if c.get("moe_latent_size"):
        raise UnsupportedModelError(
            f"The option moe_latent_size = {c['moe_latent_size']!r} is not supported in a Nemotron-H.",
            "A setting that is ignored gives garbage, so it is refused.",
        )
    own = {"layer_types": named, "num_hidden_layers": len(named), "rms_norm_eps": c["layer_norm_epsilon"]}
    return c | own


def _layers(
    kinds: Sequence[str],
    a: AttentionConfig,
    state: MambaConfig | None,
    dense: DenseConfig,
    some: ExpertsConfig | None,
) -> tuple[LayerConfig, ...]:
    one: dict[str, LayerConfig] = {
        "linear_attention": LayerConfig(state, NO_MLP),
        "full_attention": LayerConfig(replace(a, rope=None), NO_MLP),
        "mlp": LayerConfig(None, dense),
        "moe": LayerConfig(None, some or dense),
    }
    return tuple(one[kind] for kind in kinds)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    least, most = mamba.limits(c)
    state = MambaConfig(
        c["mamba_num_heads"],
        c["mamba_head_dim"],
        c["ssm_state_size"],
        c["n_groups"],
        c["conv_kernel"],
        biased=bool(c["use_conv_bias"]),
        least=least,
        most=most,
    )
    kinds, some = c["layer_types"], None
    if "moe" in kinds:
        some = ExpertsConfig(
            c["n_routed_experts"],
            c["num_experts_per_tok"],
            c["moe_intermediate_size"],
            bool(c["norm_topk_prob"]),
            shared=c["moe_shared_expert_intermediate_size"],
            sigmoid=True,
            biased=True,
            scale=float(c["routed_scaling_factor"]),
            groups=c["n_group"],
            taken_groups=c["topk_group"],
            gated=False,
        )
    return _layers(kinds, stack.attention, state, replace(stack.mlp, gated=False), some)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    heads, sizes = m.each("attention.head_count_kv", stack.n), m.each("feed_forward_length", stack.n)
    inside, some = "mlp", None
    if m.number("expert_count", 0):
        inside = "moe"
        some = replace(
            mixtral.experts_from_gguf(m, m.number("expert_feed_forward_length")),
            shared=m.number("expert_shared_feed_forward_length"),
            sigmoid=True,
            biased=True,
            scale=float(m.number("expert_weights_scale", 0.0)) or 1.0,
            gated=False,
        )
    kinds = [
        "full_attention" if heads[i] and not sizes[i] else inside if sizes[i] else "linear_attention"
        for i in range(stack.n)
    ]
    state = mamba.from_gguf(m, kinds.index("linear_attention")) if "linear_attention" in kinds else None
    return _layers(kinds, stack.attention, state, replace(stack.mlp, gated=False), some)


HF = {
    "NemotronHForCausalLM": FromHF(
        DEFAULTS,
        ("n_group", "n_routed_experts", "n_shared_experts", "num_experts", "num_local_experts"),
        activation=("mlp_hidden_act", "relu2"),
        layers=_from_hf,
        constants=lambda c: {"norm_eps": float(c["layer_norm_epsilon"])},
        mixers=tuple(KINDS.values()),
        vectors=mamba.KEPT | {mixtral.BIAS: Kept(part="")},
        tensors=(
            (r"^(model\.)?backbone\.", "model."),
            (r"^model\.lm_head\.", "lm_head."),
            (r"^model\.embeddings\.", "model.embed_tokens."),
            (r"^model\.norm_f\.", "model.norm."),
            *mamba.OWN_NAMES,
            (r"\.mixer\.gate\.e_score_correction_bias$", f".{mixtral.BIAS}.weight"),
            (r"\.mixer\.(gate|experts)\.", r".mlp.\1."),
        ),
        written=(
            (r"^model\.norm\.", "model.norm_f."),
            (r"^model\.embed_tokens\.", "model.embeddings."),
            (r"\.mlp\.expert_bias$", ".mixer.gate.e_score_correction_bias"),
            (r"\.mlp\.(gate|experts)\.", r".mixer.\1."),
        ),
        said=_said,
    )
}
_DENSE = FromGGUF(
    {
        "norm": "attn_norm",
        **{name: f"attn_{name[6]}" for name in QKV},
        OUT: "attn_output",
        UP: "ffn_up",
        DOWN: "ffn_down",
        **{f"mixer.{k}": name for k, name in mamba.GGUF_NAMES.items()},
    },
    layers=_from_gguf,
    tensors=mamba.GGUF_OWN,
    flattened=("mixer.A_log", "mixer.D", "mixer.norm"),
    varied=True,
)
GGUF = {
    "nemotron_h": _DENSE,
    "nemotron_h_moe": replace(
        _DENSE,
        names={
            **_DENSE.names,
            **{k: name for k, name in mixtral.EXPERT_NAMES.items() if "experts" in k or k == mixtral.ROUTER},
            mixtral.BIAS: "exp_probs_b",
            SHARED[0]: "ffn_up_shexp",
            SHARED[1]: "ffn_down_shexp",
        },
        tensors=(*mamba.GGUF_OWN, (r"\.exp_probs_b\.bias$", ".exp_probs_b.weight")),
        options=("expert_count", "expert_gating_func", "expert_shared_count", "expert_weights_scale"),
    ),
}


@dataclass(frozen=True)
class Attention:
    """Weights of a block that attends, as the backend's handles."""

    qkv: Handle
    o: Handle


@dataclass(frozen=True)
class Mlp:
    """Weights of a block that is an MLP, as the backend's handles; beside experts, what all tokens take."""

    experts: mixtral.Experts | None
    up: Handle
    down: Handle


@dataclass(frozen=True)
class Block:
    """Weights of one block, as the backend's handles."""

    norm: Handle
    inside: Attention | mamba.Mamba | Mlp


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    norm = w.vector(p + "norm")
    if isinstance(layer.mixer, MambaConfig):
        return Block(norm, mamba.load(w, p + "mixer.", layer.mixer))
    if layer.mixer is not None:
        return Block(norm, Attention(w.linear(*(p + name for name in QKV)), w.linear(p + OUT)))
    if isinstance(layer.mlp, DenseConfig):
        return Block(norm, Mlp(None, w.linear(p + UP), w.linear(p + DOWN)))
    experts = mixtral.load_experts(w, p, layer.mlp)
    return Block(norm, Mlp(experts, *(w.linear(p + name) for name in SHARED)))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One block. x: [T, hidden]."""
    n, one, inside = ops.rms_norm(x, w.norm, cfg.norm_eps), cfg.layers[layer], w.inside
    if isinstance(inside, mamba.Mamba):
        assert isinstance(one.mixer, MambaConfig)
        return mamba.mixed(ops, one.mixer, inside, n, layer, cfg.norm_eps, add_to=x)
    if isinstance(inside, Attention):
        q, k, v = ops.split_heads(ops.linear(n, inside.qkv), one.attention)
        return ops.linear(llama.attend(ops, one.attention, q, k, v, layer), inside.o, add_to=x)
    if inside.experts is not None:
        assert isinstance(one.mlp, ExpertsConfig)
        x = mixtral.experts(ops, one.mlp, inside.experts, n, add_to=x)
    return ops.linear(ops.relu_square(ops.linear(n, inside.up)), inside.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h, one = f"model.layers.{layer}.", cfg.hidden_size, cfg.layers[layer]
    if isinstance(one.mixer, MambaConfig):
        return mamba.linears(p + "mixer.", h, one.mixer)
    if one.mixer is not None:
        a = one.attention
        outs = (a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, a.n_kv_heads * a.head_dim)
        return {p + name: (n, h) for name, n in zip(QKV, outs, strict=True)} | {p + OUT: (h, outs[0])}
    if isinstance(one.mlp, DenseConfig):
        return {p + UP: (one.mlp.size, h), p + DOWN: (h, one.mlp.size)}
    shared = {p + SHARED[0]: (one.mlp.shared, h), p + SHARED[1]: (h, one.mlp.shared)}
    return mixtral.expert_linears(cfg, layer) | shared


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has."""
    p, one = f"model.layers.{layer}.", cfg.layers[layer]
    shapes: dict[str, tuple[int, ...]] = {p + "norm": (cfg.hidden_size,)}
    if isinstance(one.mixer, MambaConfig):
        shapes |= mamba.vectors(p + "mixer.", one.mixer)
    return shapes | ({p + mixtral.BIAS: (one.mlp.n,)} if isinstance(one.mlp, ExpertsConfig) else {})


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return (UP, DOWN, *SHARED) if cfg.mlp_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    state = next((layer.mixer for layer in cfg.layers if isinstance(layer.mixer, MambaConfig)), None)
    dense = next((m.size for layer in cfg.layers if isinstance(m := layer.mlp, DenseConfig) and m.size), 1)
    some = next((layer.mlp for layer in cfg.layers if isinstance(layer.mlp, ExpertsConfig)), None)

    def kind(layer: LayerConfig) -> str:
        if layer.mixer is None:
            return "mlp" if isinstance(layer.mlp, DenseConfig) else "moe"
        return "linear_attention" if isinstance(layer.mixer, MambaConfig) else "full_attention"

    mine: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "mlp_hidden_act": "relu2",
        "layers_block_type": [kind(layer) for layer in cfg.layers],
        "layer_norm_epsilon": cfg.norm_eps,
        "intermediate_size": dense,
    }
    if state is not None:
        mine |= {"mamba_num_heads": state.n_heads, "mamba_head_dim": state.head_dim, "n_groups": state.groups}
        mine |= {"ssm_state_size": state.state, "conv_kernel": state.width, "use_conv_bias": state.biased}
    if some is not None:
        mine |= {"n_routed_experts": some.n, "num_experts_per_tok": some.taken, "n_group": some.groups}
        mine |= {"moe_intermediate_size": some.size, "moe_shared_expert_intermediate_size": some.shared}
        mine |= {"norm_topk_prob": some.normalize, "routed_scaling_factor": some.scale}
        mine |= {"topk_group": some.taken_groups}
    return mine
