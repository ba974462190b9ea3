"""Llama 2/3/3.x, SmolLM2, Mistral, Ministral: pre-norm decoder with GQA, rotary embedding, RMSNorm and SwiGLU
(Touvron et al. 2023). Other families say in their files how they differ from this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinychat.network import eagle, further, hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.eagle import Eagle
from tinychat.network.family import FromGGUF, FromHF, Settings, WeightSource
from tinychat.network.further import Further
from tinychat.network.ops import Handle, Ops

HF = {
    "LlamaForCausalLM": FromHF(),
    "MistralForCausalLM": FromHF(
        {"sliding_window": 4096},
        windows=True,
        tensors=hf_config.WRAPPED,
        model_type="mistral",
        wrappers=("Mistral3ForConditionalGeneration",),
    ),
    "MinistralForCausalLM": FromHF({"sliding_window": 4096}, windows=True),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF = {"llama": FromGGUF(NAMES, interleaved=True)}
NORM_OFFSET = 0.0

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles."""

    attn_norm: Handle
    qkv: Handle
    o: Handle
    mlp_norm: Handle
    gate_up: Handle
    down: Handle


@dataclass(frozen=True)
class Weights:
    """Weights of the model, as the backend's handles."""

    embed: Handle
    blocks: list[Any]
    norm: Handle
    head: Handle
    further: Further | Eagle | None


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*(p + name for name in ATTENTION[:3])),
        o=w.linear(p + "self_attn.o_proj"),
        mlp_norm=w.vector(p + "post_attention_layernorm"),
        gate_up=w.linear(p + "mlp.gate_proj", p + "mlp.up_proj"),
        down=w.linear(p + "mlp.down_proj"),
    )


LoadBlock = Callable[[WeightSource, str, LayerConfig], Any]


def load(w: WeightSource, cfg: ModelConfig, load_block: LoadBlock = load_block) -> Weights:
    """Ask the backend's loader `w` for every weight by its Hugging Face name, in the order of use."""
    embed = w.embedding("model.embed_tokens")
    blocks = [load_block(w, f"model.layers.{i}.", layer) for i, layer in enumerate(cfg.layers)]
    norm, head = w.vector("model.norm"), w.head("lm_head", tied_to=embed)
    return Weights(embed, blocks, norm, head, further.load(w, cfg, load_block))


def attend(
    ops: Ops, a: AttentionConfig, q: Handle, k: Handle, v: Handle, layer: int, sinks: Handle | None = None
) -> Handle:
    """Attention with queries and keys rotated, where the layer rotates them: [T, heads·D]."""
    if a.rope:
        q, k = ops.rope(q, k, a.rope)
    return ops.attention(q, k, v, a, layer, sinks)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(attend(ops, a, q, k, v, layer), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(
    ops: Ops,
    cfg: ModelConfig,
    w: Weights,
    block: Callable[..., Handle] = block,
    keep: further.Keep | None = None,
) -> Handle:
    """Token ids (the step's input) to logits. keep: what a block that attends leaves for later rows, in a
    family that knows the layer which predicts further.
    """
    x, seen = ops.embed(w.embed, cfg.embed_scale), None
    for layer, weights in enumerate(w.blocks):
        seen = eagle.tapped(ops, cfg, w, x, layer, seen)
        x = block(ops, cfg, weights, x, layer)
    if cfg.head is not None:
        eagle.remember(ops, cfg, w, eagle.tapped(ops, cfg, w, x, cfg.n_layers, seen))
    elif w.further is not None and keep is not None:
        further.remember(ops, cfg, w, x, keep)
    return ops.lm_head(ops.rms_norm(x, w.norm, cfg.norm_eps), w.head, soft_cap=cfg.logit_soft_cap)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears: what readers check and quantizers quantize."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    d, h, f = a.head_dim, cfg.hidden_size, cfg.layers[layer].mlp.size
    return {
        p + "self_attn.q_proj": (a.n_heads * d, h),
        p + "self_attn.k_proj": (a.n_kv_heads * d, h),
        p + "self_attn.v_proj": (a.n_kv_heads * d, h),
        p + "self_attn.o_proj": (h, a.n_heads * d),
        p + "mlp.gate_proj": (f, h),
        p + "mlp.up_proj": (f, h),
        p + "mlp.down_proj": (h, f),
    }


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    p = f"model.layers.{layer}."
    return {p + name: (cfg.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    return (ATTENTION if cfg.attention_bias else ()) + (MLP if cfg.mlp_bias else ())


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model: with windows it is a Mistral."""
    return {"architectures": ["MistralForCausalLM" if cfg.windowed else "LlamaForCausalLM"]}
