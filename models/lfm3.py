"""LFM3: LFM2 with norms on both sides, a window in some of the layers that attend, a sigmoid gate on each
head, and in the layers that see everything a rope that turns half of the pairs (Liquid AI 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import lfm2, llama
from tinychat.models.lfm2 import NORM_OFFSET
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Settings, Stack, WeightSource
from tinychat.network.hf_rope import rope_config
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import ConvConfig

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

ROPES: Settings = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    types = c.get("layer_types") or [
        "full_attention" if i % 4 == 2 else "sliding_attention" if i % 4 == 0 and i else "conv"
        for i in range(stack.n)
    ]
    if len(types) < stack.n:
        raise ValueError(f"layer_types names {len(types)} layers")
    local = rope_config({**c, "rope_parameters": c["rope_parameters"]["sliding_attention"]}, c["head_dim"])
    mixers: dict[str, AttentionConfig | ConvConfig] = {
        "conv": ConvConfig(c["hidden_size"], c["conv_L_cache"]),
        "full_attention": replace(stack.attention, window=0),
        "sliding_attention": replace(stack.attention, rope=local),
    }
    return stack.layers(lambda i: mixers[types[i]])


GATE = "self_attn.gate_proj"  # as files call it
HF = {
    "Lfm3ForCausalLM": FromHF(
        lfm2.DEFAULTS | {"head_dim": 128, "conv_L_cache": 7, "sliding_window": 256, "rope_parameters": ROPES},
        windows=True,
        layers=_from_hf,
        constants=lfm2.constants,
        mixers=("conv",),
        vectors=lfm2.KEPT | {GATE: Kept()},
        tensors=(lfm2.LAST_NORM, (r"\.self_attn\.g_proj\.", ".self_attn.gate_proj.")),
        written=(lfm2.LAST_WRITTEN, (r"\.self_attn\.gate_proj\.", ".self_attn.g_proj.")),
    )
}
GGUF: dict[str, FromGGUF] = {}
NORMS = ("operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm")


@dataclass(frozen=True)
class Attention:
    """Weights of a layer's attention, as the backend's handles."""

    qkv: Handle
    q_norm: Handle
    k_norm: Handle
    gate: Handle
    o: Handle


@dataclass(frozen=True)
class Conv:
    """Weights of a layer's convolution, as the backend's handles."""

    bcx: Handle
    conv: Handle
    out: Handle


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    norm: Handle
    mixer: Attention | Conv
    post_norm: Handle
    mlp_norm: Handle
    gate_up: Handle
    down: Handle
    mlp_post_norm: Handle


def load_mixer(w: WeightSource, p: str, layer: LayerConfig) -> Attention | Conv:
    """What mixes the tokens in the block whose modules' names begin with `p`."""
    if isinstance(layer.mixer, ConvConfig):
        bcx, conv = w.linear(p + "conv.in_proj"), w.vector(p + "conv.conv")
        return Conv(bcx, conv, w.linear(p + "conv.out_proj"))
    qkv = w.linear(*(p + name for name in llama.ATTENTION[:3]))
    q_norm, k_norm = (w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm"))
    return Attention(qkv, q_norm, k_norm, w.router(p + GATE), w.linear(p + llama.ATTENTION[3]))


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        norm=w.vector(p + NORMS[0]),
        mixer=load_mixer(w, p, layer),
        post_norm=w.vector(p + NORMS[1]),
        mlp_norm=w.vector(p + NORMS[2]),
        gate_up=w.linear(p + "feed_forward.w1", p + "feed_forward.w3"),
        down=w.linear(p + "feed_forward.w2"),
        mlp_post_norm=w.vector(p + NORMS[3]),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def mixed(ops: Ops, cfg: ModelConfig, w: Attention | Conv, n: Handle, layer: int) -> Handle:
    """What a layer's mixer makes of n [T, hidden], normed."""
    if isinstance(w, Conv):
        conv = cfg.layers[layer].mixer
        assert isinstance(conv, ConvConfig)
        return ops.linear(ops.short_conv(ops.linear(n, w.bcx), w.conv, conv, layer), w.out)
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(n, w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    gate = ops.linear(n, w.gate)
    return ops.linear(ops.sigmoid_mul(llama.attend(ops, a, q, k, v, layer), gate), w.o)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    y = mixed(ops, cfg, w.mixer, ops.rms_norm(x, w.norm, cfg.norm_eps), layer)
    x = ops.rms_norm(y, w.post_norm, cfg.norm_eps, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    y = ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down)
    return ops.rms_norm(y, w.mlp_post_norm, cfg.norm_eps, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears, but for the gate."""
    shapes = lfm2.linears(cfg, layer)
    return {name.replace("self_attn.out_proj", "self_attn.o_proj"): shape for name, shape in shapes.items()}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has: norms, the convolution, the gate of attention."""
    p, a = f"model.layers.{layer}.", cfg.layers[layer].mixer
    shapes: dict[str, tuple[int, ...]] = {p + name: (cfg.hidden_size,) for name in NORMS}
    if isinstance(a, ConvConfig):
        return shapes | {p + "conv.conv": (a.channels, a.width)}
    a = cfg.layers[layer].attention
    heads = {f"{p}self_attn.{name}": (a.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes | heads | {p + GATE: (a.n_heads, cfg.hidden_size)}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return llama.ATTENTION if cfg.attention_bias else ()


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model, which comes as a folder: its own is kept."""
    return {"architectures": ["Lfm3ForCausalLM"], **lfm2.mixer_settings(cfg)}
