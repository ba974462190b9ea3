"""Falcon-H1: attention and a state-space layer side by side in every block, both read the same norm; factors
on what most linears read or give, which GGUF holds as part of the weights (TII 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import llama
from tinychat.models.llama import ATTENTION, NAMES, NORM_OFFSET
from tinychat.network import mamba
from tinychat.network.config import Factors, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import MambaConfig

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")
OUTER = ("embedding_multiplier", "lm_head_multiplier")
INNER = (
    "key_multiplier",
    *tuple(f"{half}_{end}_multiplier" for half in ("attention", "ssm") for end in ("in", "out")),
)
ONES = dict.fromkeys((*OUTER, *INNER), 1.0)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    for name in BIASES:
        if c.get(name):
            raise UnsupportedModelError(
                f"The option {name} = {c[name]!r} is not supported in a FalconH1ForCausalLM.",
                "A setting that is ignored gives garbage, so it is refused.",
            )
    values = c["mamba_d_ssm"]
    state = mamba.from_hf(c, int(c["mamba_expand"] * c["hidden_size"]) if values is None else values)
    state = replace(state, normed=bool(c["mamba_rms_norm"]), gated=not c["mamba_norm_before_gate"])
    state = state if state.normed else replace(state, gated=True)
    into, attends = float(c["ssm_in_multiplier"]), float(c["attention_in_multiplier"])
    gate, down = map(float, c["mlp_multipliers"] or (1.0, 1.0))
    factors = Factors(
        into=tuple(into * float(f) for f in c["ssm_multipliers"] or (1.0,) * 5),
        out=float(c["ssm_out_multiplier"]),
        attention=attends * float(c["attention_out_multiplier"]),
        gate=gate,
        down=down,
    )
    a = stack.attention
    a = replace(a, scale=a.head_dim**-0.5 * attends**2 * float(c["key_multiplier"]))
    return (LayerConfig(a, stack.mlp, beside=state, factors=factors),) * stack.n


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    state = mamba.from_gguf(m, 0)
    return (LayerConfig(stack.attention, stack.mlp, beside=state),) * stack.n


def _constants(c: Settings) -> dict[str, Any]:
    return {"embed_scale": float(c[OUTER[0]]), "logit_scale": float(c[OUTER[1]])}


HF = {
    "FalconH1ForCausalLM": FromHF(
        mamba.DEFAULTS
        | ONES
        | {
            "mamba_d_ssm": 1024,
            "mamba_rms_norm": False,
            "mamba_norm_before_gate": True,
            "mlp_multipliers": None,
            "ssm_multipliers": None,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
        },
        ("embedding_multiplier",),
        layers=_from_hf,
        constants=_constants,
        mixers=("hybrid",),
        vectors=mamba.KEPT,
        tensors=(*mamba.OWN_NAMES, (r"^model\.final_layernorm\.", "model.norm.")),
        written=((r"^model\.norm\.", "model.final_layernorm."),),
    )
}
_RENAMED = {"mlp": "feed_forward", "post_attention_layernorm": "pre_ff_layernorm"}
GGUF = {
    "falcon-h1": FromGGUF(
        {".".join(_RENAMED.get(part, part) for part in k.split(".")): name for k, name in NAMES.items()}
        | {f"mamba.{k}": name for k, name in mamba.GGUF_NAMES.items()},
        layers=_from_gguf,
        tensors=(*mamba.GGUF_OWN, (r"\.ffn_norm$", ".ffn_norm.weight")),
        flattened=("mamba.A_log", "mamba.D", "mamba.norm"),
    )
}
MLP = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and a state-space layer."""

    state: mamba.Mamba


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in ATTENTION[:3])),
        o=w.linear(p + ATTENTION[3]),
        state=mamba.load(w, p + "mamba.", _state(layer)),
        mlp_norm=w.vector(p + "pre_ff_layernorm"),
        gate_up=w.linear(p + MLP[0], p + MLP[1]),
        down=w.linear(p + MLP[2]),
    )


def _state(layer: LayerConfig) -> MambaConfig:
    assert isinstance(layer.beside, MambaConfig)
    return layer.beside


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def _times(ops: Ops, x: Handle, sizes: tuple[int, ...], factors: tuple[float, ...]) -> Handle:
    return x if set(factors) == {1.0} else ops.multiplied(x, sizes, factors)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    one, f, eps = cfg.layers[layer], cfg.layers[layer].factors, cfg.norm_eps
    a, m, size = one.attention, _state(one), one.mlp.size
    n = ops.rms_norm(x, w.attn_norm, eps)
    shared = m.groups * m.state
    z = _times(ops, ops.linear(n, w.state.into), (m.values, m.values, shared, shared, m.n_heads), f.into)
    y = _times(ops, ops.mamba(z, w.state.vectors, m, layer, eps), (m.values,), (f.out,))
    q, k, v = ops.split_heads(ops.linear(n, w.qkv), a)
    found = _times(ops, llama.attend(ops, a, q, k, v, layer), (a.n_heads * a.head_dim,), (f.attention,))
    x = ops.linear(found, w.o, add_to=ops.linear(y, w.state.out, add_to=x))
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, eps), w.gate_up)
    return ops.linear(ops.silu_mul(_times(ops, gate_up, (size, size), (f.gate, f.down))), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    x = ops.embed(w.embed, cfg.embed_scale)
    for layer, weights in enumerate(w.blocks):
        x = block(ops, cfg, weights, x, layer)
    return ops.lm_head(ops.rms_norm(x, w.norm, cfg.norm_eps), w.head, cfg.logit_scale)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h = f"model.layers.{layer}.", cfg.hidden_size
    shapes = {name.replace(".mlp.", ".feed_forward."): s for name, s in llama.linears(cfg, layer).items()}
    return shapes | mamba.linears(p + "mamba.", h, _state(cfg.layers[layer]))


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has."""
    p, h = f"model.layers.{layer}.", cfg.hidden_size
    shapes: dict[str, tuple[int, ...]] = {p + "input_layernorm": (h,), p + "pre_ff_layernorm": (h,)}
    return shapes | mamba.vectors(p + "mamba.", _state(cfg.layers[layer]))


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias: none."""
    return ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    one, m = cfg.layers[0], _state(cfg.layers[0])
    f, a = one.factors, one.attention
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "embedding_multiplier": cfg.embed_scale,
        "lm_head_multiplier": cfg.logit_scale,
        "key_multiplier": (a.scale or a.head_dim**-0.5) * a.head_dim**0.5,
        "attention_out_multiplier": f.attention,
        "ssm_multipliers": list(f.into),
        "ssm_out_multiplier": f.out,
        "mlp_multipliers": [f.gate, f.down],
        "mamba_d_ssm": m.values,
        "mamba_rms_norm": m.normed,
        "mamba_norm_before_gate": not m.gated,
        **mamba.settings(m),
    }
