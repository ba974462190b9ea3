"""Granite with windows: Granite in which three of four layers attend to a window, and each head has a sink,
one more score that takes its share of the attention (IBM 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.models import granite, llama
from tinychat.models.granite import NORM_OFFSET, biases, linears
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

SINKS = "self_attn.sinks"


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    thetas = c.get("layer_rope_theta")
    if thetas is not None and len(thetas) < stack.n:
        raise ValueError(f"layer_rope_theta names {len(thetas)} layers")
    here = hf_config.slides(c, lambda i: bool(i % 4))
    near = replace(stack.attention, scale=float(c["attention_multiplier"]))

    def attention(i: int) -> AttentionConfig:
        a = near if here(i) else replace(near, window=0)
        if thetas is None or a.rope is None:
            return a
        return replace(a, rope=replace(a.rope, theta=float(thetas[i])) if thetas[i] else None)

    return stack.layers(attention)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    slides = m.flags("attention.sliding_window_pattern", stack.n, lambda i: bool(i % 4))
    rotated = m.flags("attention.rope_pattern", stack.n, lambda i: True)
    near = replace(stack.attention, scale=float(m.number("attention.scale", 0)) or None)

    def attention(i: int) -> AttentionConfig:
        a = near if slides(i) else replace(near, window=0)
        return a if rotated(i) else replace(a, rope=None)

    return stack.layers(attention)


HF = {
    "GraniteSWAForCausalLM": FromHF(
        dict.fromkeys(granite.MULTIPLIERS, 1.0)
        | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
        | {"sliding_window": 128, "max_position_embeddings": 8192},
        granite.MULTIPLIERS,
        windows=True,
        layers=_from_hf,
        constants=granite.HF["GraniteForCausalLM"].constants,
        tensors=((r"\.sinks$", ".sinks.weight"),),
        vectors={SINKS: Kept(part="")},
    )
}
GGUF = {
    "granite_swa": replace(
        granite.GGUF["granite"],
        names={**granite.GGUF["granite"].names, SINKS: "attn_sinks"},
        options=(*granite.GGUF["granite"].options, "attention.sliding_window_pattern"),
        layers=_from_gguf,
    )
}


@dataclass(frozen=True)
class Block(llama.Block):
    """Llama's, and the sinks of the heads."""

    sinks: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    return Block(**vars(llama.load_block(w, p, layer)), sinks=w.vector(p + SINKS))


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    x = ops.linear(llama.attend(ops, a, q, k, v, layer, w.sinks), w.o, add_to=x)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return granite.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors, the sinks among them."""
    return llama.norms(cfg, layer) | {f"model.layers.{layer}.{SINKS}": (cfg.layers[layer].attention.n_heads,)}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    ropes = [layer.attention.rope for layer in cfg.layers]
    return granite.settings(cfg) | {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "layer_types": hf_config.layer_types(cfg),
        "layer_rope_theta": [rope.theta if rope else 0 for rope in ropes],
    }
