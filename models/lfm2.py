"""LFM2: most layers mix tokens by a gated short convolution in place of attention; the others are Qwen3's,
all under names of their own (Liquid AI, LFM2 Technical Report, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tinychat.models import llama, qwen3
from tinychat.network.config import DenseConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import ConvConfig

DEFAULTS: Settings = {
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 128000,
    "conv_L_cache": 3,
    "tie_word_embeddings": True,
}
ADJUSTED: Settings = {
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
}


def constants(c: Settings) -> dict[str, Any]:
    """What ModelConfig has of settings with other names."""
    tied = c.get("tie_embedding")
    return {
        "norm_eps": float(c["norm_eps"]),
        "tie_embeddings": bool(c["tie_word_embeddings"] if tied is None else tied),
    }


def _mlp(c: Settings) -> DenseConfig:
    """The MLP, whose size may be said as that of one without a gate."""
    size = c.get("block_ff_dim") or c["intermediate_size"]
    if c["block_auto_adjust_ff_dim"]:
        multiplier, whole = c["block_ffn_dim_multiplier"], c["block_multiple_of"]
        size = int(2 * size / 3)
        if multiplier is not None:
            size = -(-int(multiplier * size) // whole) * whole
    return DenseConfig(size)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    return layers_from_hf(c, replace(stack, mlp=_mlp(c)))


def layers_from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    """The layers, of which `layer_types` (or `full_attn_idxs`) says which ones attend."""
    conv, types = ConvConfig(c["hidden_size"], c["conv_L_cache"]), c.get("layer_types")
    attending = c.get("full_attn_idxs")
    if types is None:
        attending = range(stack.n) if attending is None else attending
        types = ["full_attention" if i in attending else "conv" for i in range(stack.n)]
    if len(types) < stack.n:
        raise ValueError(f"layer_types names {len(types)} layers")
    return stack.layers(lambda i: conv if types[i] == "conv" else stack.attention)


def layers_from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    """The layers: those without KV heads are convolutions."""
    conv = ConvConfig(m.number("embedding_length"), m.number("shortconv.l_cache"))
    heads = m.each("attention.head_count_kv", stack.n)
    return stack.layers(lambda i: stack.attention if heads[i] else conv)


NAMES = {
    "model.norm": "token_embd_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
LAST_NORM = (r"^model\.embedding_norm\.", "model.norm.")
LAST_WRITTEN = (r"^model\.norm\.", "model.embedding_norm.")
KEPT = {"conv.conv": Kept(write=lambda a: a[:, None])}
HF = {
    "Lfm2ForCausalLM": FromHF(
        DEFAULTS | ADJUSTED,
        layers=_from_hf,
        constants=constants,
        mixers=("conv",),
        vectors=KEPT,
        tensors=(LAST_NORM,),
        written=(LAST_WRITTEN,),
    )
}
GGUF = {"lfm2": FromGGUF(NAMES, layers=layers_from_gguf)}
NORM_OFFSET = 0.0

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
HEAD_NORMS = ("self_attn.q_layernorm", "self_attn.k_layernorm")


@dataclass(frozen=True)
class Attention:
    """Weights of a layer's attention, as the backend's handles."""

    attn_norm: Handle
    qkv: Handle
    q_norm: Handle
    k_norm: Handle
    o: Handle


@dataclass(frozen=True)
class Conv:
    """Weights of a layer's convolution, as the backend's handles."""

    norm: Handle
    bcx: Handle
    conv: Handle
    out: Handle


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    mixer: Attention | Conv
    mlp_norm: Handle
    gate_up: Handle
    down: Handle


def load_mixer(w: WeightSource, p: str, layer: LayerConfig) -> Attention | Conv:
    """What mixes the tokens in the block whose modules' names begin with `p`."""
    norm = w.vector(p + "operator_norm")
    if isinstance(layer.mixer, ConvConfig):
        bcx, conv = w.linear(p + "conv.in_proj"), w.vector(p + "conv.conv")
        return Conv(norm, bcx, conv, w.linear(p + "conv.out_proj"))
    qkv = w.linear(*(p + name for name in ATTENTION[:3]))
    q_norm, k_norm = (w.vector(p + name) for name in HEAD_NORMS)
    return Attention(norm, qkv, q_norm, k_norm, w.linear(p + ATTENTION[3]))


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        mixer=load_mixer(w, p, layer),
        mlp_norm=w.vector(p + "ffn_norm"),
        gate_up=w.linear(p + "feed_forward.w1", p + "feed_forward.w3"),
        down=w.linear(p + "feed_forward.w2"),
    )


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def mixed(ops: Ops, cfg: ModelConfig, w: Attention | Conv, x: Handle, layer: int) -> Handle:
    """The mixing half of a block. x: [T, hidden]."""
    if isinstance(w, Attention):
        return qwen3.attention(ops, cfg, w, x, layer)
    conv = cfg.layers[layer].mixer
    assert isinstance(conv, ConvConfig)
    bcx = ops.linear(ops.rms_norm(x, w.norm, cfg.norm_eps), w.bcx)
    return ops.linear(ops.short_conv(bcx, w.conv, conv, layer), w.out, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    x = mixed(ops, cfg, w.mixer, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def mixer_linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of the linears that mix tokens."""
    p, h, a = f"model.layers.{layer}.", cfg.hidden_size, cfg.layers[layer].mixer
    if isinstance(a, ConvConfig):
        return {p + "conv.in_proj": (3 * h, h), p + "conv.out_proj": (h, h)}
    a = cfg.layers[layer].attention
    outs = (a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, a.n_kv_heads * a.head_dim)
    heads = {p + name: (n, h) for name, n in zip(ATTENTION, outs, strict=False)}
    return heads | {p + ATTENTION[3]: (h, outs[0])}


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h, f = f"model.layers.{layer}.feed_forward.", cfg.hidden_size, cfg.layers[layer].mlp.size
    return mixer_linears(cfg, layer) | {p + "w1": (f, h), p + "w3": (f, h), p + "w2": (h, f)}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's vectors, the taps of the convolution among them."""
    p, a = f"model.layers.{layer}.", cfg.layers[layer].mixer
    shapes: dict[str, tuple[int, ...]] = {p + n: (cfg.hidden_size,) for n in ("operator_norm", "ffn_norm")}
    if isinstance(a, ConvConfig):
        return shapes | {p + "conv.conv": (a.channels, a.width)}
    return shapes | {p + name: (cfg.layers[layer].attention.head_dim,) for name in HEAD_NORMS}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias: none."""
    return ()


def mixer_settings(cfg: ModelConfig) -> dict[str, Any]:
    """Entries of config.json about the layers."""
    width = next((layer.mixer.width for layer in cfg.layers if isinstance(layer.mixer, ConvConfig)), 3)
    return {
        "norm_eps": cfg.norm_eps,
        "conv_L_cache": width,
        "layer_types": [
            "conv" if isinstance(layer.mixer, ConvConfig) else "full_attention" for layer in cfg.layers
        ],
    }


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mine = {"architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": False}
    return mine | mixer_settings(cfg)
