"""Qwen3.5: three of four layers mix tokens by a gated delta rule behind a short convolution (Yang et al.,
Gated Delta Networks, 2024); the others are Qwen3's attention, a quarter of each head rotated, with a gate on
what comes out. Files hold its norms less one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import llama
from tinychat.models.llama import NAMES
from tinychat.network import further, hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import DeltaWeights, Handle, Ops
from tinychat.network.recurrence import DeltaConfig

DEFAULTS: Settings = {
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def layers_from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    """The layers, of which `layer_types` or the interval says which ones attend."""
    types, every = c.get("layer_types"), c["full_attention_interval"]
    if types is None:
        types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(stack.n)]
    if len(types) < stack.n:
        raise ValueError(f"layer_types names {len(types)} layers")
    delta = DeltaConfig(
        n_keys=c["linear_num_key_heads"],
        n_values=c["linear_num_value_heads"],
        key_dim=c["linear_key_head_dim"],
        value_dim=c["linear_value_head_dim"],
        width=c["linear_conv_kernel_dim"],
    )
    return stack.layers(lambda i: delta if types[i] == "linear_attention" else stack.attention)


def layers_from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    """The layers. Value heads that share a key head lie apart in these files."""
    keys, values = m.number("ssm.group_count"), m.number("ssm.time_step_rank")
    dim, inner = m.number("ssm.state_size"), m.number("ssm.inner_size")
    delta = DeltaConfig(keys, values, dim, inner // values, m.number("ssm.conv_kernel"), tiled=keys != values)
    every = m.number("full_attention_interval", 4)
    recurrent = m.flags("attention.recurrent_layers", stack.n, lambda i: bool((i + 1) % every))
    return stack.layers(lambda i: delta if recurrent(i) else stack.attention)


GATES = ("linear_attn.in_proj_b", "linear_attn.in_proj_a")
# Vectors and gates that are no norms less one, by their ends.
KEPT = {
    "linear_attn.norm": Kept(),
    "linear_attn.conv1d": Kept(write=lambda a: a[:, None]),
    "linear_attn.dt_bias": Kept(part=""),
    "linear_attn.A_log": Kept(lambda a: -np.exp(a), lambda a: np.log(-a), part=""),
    **dict.fromkeys(GATES, Kept()),
}
OWN_NAMES = (r"\.linear_attn\.(A_log|dt_bias)$", r".linear_attn.\1.weight")
GGUF_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
GGUF_OWN = ((r"\.ssm_dt\.bias$", ".ssm_dt.weight"), (r"\.ssm_a$", ".ssm_a.weight"))
HF = {
    "Qwen3_5ForCausalLM": FromHF(
        DEFAULTS,
        partial_rope=True,
        layers=layers_from_hf,
        mixers=("linear_attention",),
        vectors=KEPT,
        tensors=(*hf_config.WRAPPED, OWN_NAMES),
        model_type="qwen3_5_text",
        wrappers=("Qwen3_5ForConditionalGeneration",),
    )
}
GGUF = {"qwen35": FromGGUF(GGUF_NAMES, layers=layers_from_gguf, tensors=GGUF_OWN)}
NORM_OFFSET = 1.0


@dataclass(frozen=True)
class Attention:
    """Weights of a layer's attention, as the backend's handles."""

    qkv: Handle
    q_norm: Handle
    k_norm: Handle
    out: Handle


@dataclass(frozen=True)
class Delta:
    """Weights of a layer's delta rule, as the backend's handles."""

    qkv: Handle
    z: Handle
    beta: Handle
    alpha: Handle
    vectors: DeltaWeights
    norm: Handle
    out: Handle


@dataclass(frozen=True)
class Mixer:
    """Weights of a block's mixing half, as the backend's handles."""

    norm: Handle
    mixer: Attention | Delta


@dataclass(frozen=True)
class Block(Mixer):
    """Weights of one decoder block, as the backend's handles."""

    mlp_norm: Handle
    gate_up: Handle
    down: Handle


def load_mixer(w: WeightSource, p: str, layer: LayerConfig) -> Mixer:
    """The mixing half of the block whose modules' names begin with `p`."""
    norm = w.vector(p + "input_layernorm")
    if not isinstance(layer.mixer, DeltaConfig):
        qkv = w.linear(*(p + name for name in llama.ATTENTION[:3]))
        q_norm, k_norm = (w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm"))
        return Mixer(norm, Attention(qkv, q_norm, k_norm, w.linear(p + "self_attn.o_proj")))
    p += "linear_attn."
    qkv, z = w.linear(p + "in_proj_qkv"), w.linear(p + "in_proj_z")
    beta, alpha = w.router(p + "in_proj_b"), w.router(p + "in_proj_a")
    vectors = DeltaWeights(*(w.vector(p + name) for name in ("conv1d", "A_log", "dt_bias")))
    return Mixer(norm, Delta(qkv, z, beta, alpha, vectors, w.vector(p + "norm"), w.linear(p + "out_proj")))


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        **vars(load_mixer(w, p, layer)),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        gate_up=w.linear(p + "mlp.gate_proj", p + "mlp.up_proj"),
        down=w.linear(p + "mlp.down_proj"),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def _heads(
    ops: Ops, a: AttentionConfig, w: Attention, x: Handle, eps: float
) -> tuple[Handle, Handle, Handle, Handle]:
    q, k, v, gate = ops.gated_heads(ops.linear(x, w.qkv), a)
    return *ops.norm_heads(q, k, w.q_norm, w.k_norm, eps), v, gate


def keep(ops: Ops, cfg: ModelConfig, w: Mixer, x: Handle, layer: int) -> None:
    """Keys and values of a block that attends, for rows that come later. x: [T, hidden]."""
    assert isinstance(w.mixer, Attention)
    a = cfg.layers[layer].attention
    q, k, v, _ = _heads(ops, a, w.mixer, ops.rms_norm(x, w.norm, cfg.norm_eps), cfg.norm_eps)
    if a.rope:
        q, k = ops.rope(q, k, a.rope)
    ops.keep(k, v, a, layer)


def mixed(ops: Ops, cfg: ModelConfig, w: Mixer, x: Handle, layer: int) -> Handle:
    """The mixing half of a block. x: [T, hidden]."""
    n, m, eps = ops.rms_norm(x, w.norm, cfg.norm_eps), w.mixer, cfg.norm_eps
    if isinstance(m, Attention):
        a = cfg.layers[layer].attention
        q, k, v, gate = _heads(ops, a, m, n, eps)
        return ops.linear(ops.sigmoid_mul(llama.attend(ops, a, q, k, v, layer), gate), m.out, add_to=x)
    delta = cfg.layers[layer].mixer
    assert isinstance(delta, DeltaConfig)
    qkv, z, beta, alpha = (ops.linear(n, weight) for weight in (m.qkv, m.z, m.beta, m.alpha))
    y = ops.delta_rule(qkv, beta, alpha, m.vectors, delta, layer)
    return ops.linear(ops.norm_gated(y, m.norm, z, eps), m.out, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x = mixed(ops, cfg, w, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block, keep)


def predict(ops: Ops, cfg: ModelConfig, w: llama.Weights, few: bool = False) -> Handle:
    """Token ids, one of each sequence, to logits, by the layer that predicts further."""
    return further.predict(ops, cfg, w, block, few)


def mixer_linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of the linears that mix tokens, but for the gates."""
    p, h, d = f"model.layers.{layer}.", cfg.hidden_size, cfg.layers[layer].mixer
    if isinstance(d, DeltaConfig):
        outs = {"in_proj_qkv": d.channels, "in_proj_z": d.values}
        return {f"{p}linear_attn.{name}": (n, h) for name, n in outs.items()} | {
            p + "linear_attn.out_proj": (h, d.values)
        }
    a = cfg.layers[layer].attention
    outs = {"q_proj": 2 * a.n_heads, "k_proj": a.n_kv_heads, "v_proj": a.n_kv_heads}
    heads = {f"{p}self_attn.{name}": (n * a.head_dim, h) for name, n in outs.items()}
    return heads | {p + "self_attn.o_proj": (h, a.n_heads * a.head_dim)}


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h, f = f"model.layers.{layer}.mlp.", cfg.hidden_size, cfg.layers[layer].mlp.size
    mlp = {p + "gate_proj": (f, h), p + "up_proj": (f, h), p + "down_proj": (h, f)}
    return mixer_linears(cfg, layer) | mlp


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has: norms, the convolution, the gates of the delta rule."""
    p, h, d = f"model.layers.{layer}.", cfg.hidden_size, cfg.layers[layer].mixer
    shapes: dict[str, tuple[int, ...]] = {
        p + name: (h,) for name in ("input_layernorm", "post_attention_layernorm")
    }
    if isinstance(d, DeltaConfig):
        own = {"conv1d": (d.channels, d.width), "norm": (d.value_dim,)}
        own |= {"A_log": (d.n_values,), "dt_bias": (d.n_values,)}
        shapes |= {f"{p}linear_attn.{name}": shape for name, shape in own.items()}
        return shapes | {p + name: (d.n_values, h) for name in GATES}
    dim = cfg.layers[layer].attention.head_dim
    return shapes | {f"{p}self_attn.{name}": (dim,) for name in ("q_norm", "k_norm")}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return llama.ATTENTION if cfg.attention_bias else ()


def mixer_settings(cfg: ModelConfig) -> dict[str, Any]:
    """Entries of config.json about the layers."""
    deltas = [isinstance(layer.mixer, DeltaConfig) for layer in cfg.layers]
    own: dict[str, Any] = {
        "layer_types": ["linear_attention" if delta else "full_attention" for delta in deltas]
    }
    for layer in cfg.layers:
        if isinstance(d := layer.mixer, DeltaConfig):
            own["linear_num_key_heads"], own["linear_num_value_heads"] = d.n_keys, d.n_values
            own["linear_key_head_dim"], own["linear_value_head_dim"] = d.key_dim, d.value_dim
            own["linear_conv_kernel_dim"] = d.width
    return own


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    if any(isinstance(layer.mixer, DeltaConfig) and layer.mixer.tiled for layer in cfg.layers):
        raise UnsupportedModelError(
            "A GGUF holds the value heads of a Qwen3.5 in an order that config.json has no word for.",
            "Use --format gguf, or quantize the original folder.",
        )
    mine = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    return mine | mixer_settings(cfg)
