"""Gemma 3: Gemma 2 with norms on queries and keys instead of soft caps, and another rope base in windowed
layers (Gemma Team 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.models import gemma2, llama, qwen3
from tinychat.models.gemma2 import NORM_OFFSET, biases, linears, mlp
from tinychat.models.llama import NAMES
from tinychat.network import hf_config
from tinychat.network.config import LayerConfig, ModelConfig, RopeConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Settings, Stack, WeightSource
from tinychat.network.hf_rope import rope_config
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    # the published files spell it with and without the underscore
    every = c.get("sliding_window_pattern") or c["_sliding_window_pattern"]
    given = c.get("rope_parameters") or {}
    local = given.get("sliding_attention") or {"rope_theta": c["rope_local_base_freq"]}
    rope = rope_config({**c, "rope_parameters": local}, stack.attention.head_dim)
    return gemma2.from_hf(c, stack, lambda i: bool((i + 1) % every), rope=rope)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    rope = RopeConfig(float(m.number("rope.freq_base_swa", 10000.0)), stack.attention.head_dim)
    return gemma2.from_gguf(m, stack, 6, 62, rope=rope)


HF = {
    "Gemma3ForCausalLM": FromHF(
        # the published folders with vision say little of their text model
        gemma2.DEFAULTS
        | {"_sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"max_position_embeddings": 131072},
        ("query_pre_attn_scalar", "final_logit_softcapping"),
        windows=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        layers=_from_hf,
        constants=gemma2.constants_from_hf,
        tensors=hf_config.WRAPPED,
        model_type="gemma3_text",
        wrappers=("Gemma3ForConditionalGeneration",),
    )
}
GGUF = {
    "gemma3": FromGGUF(
        NAMES | gemma2.POST_NORMS | qwen3.HEAD_NORMS,
        options=("final_logit_softcapping",),
        layers=_from_gguf,
        constants=lambda m: gemma2.constants_from_gguf(m, 0.0),
    )
}


@dataclass(frozen=True)
class Block(gemma2.Block):
    """Gemma 2's, and the norms of queries and keys."""

    q_norm: Handle
    k_norm: Handle


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    heads = {name: w.vector(f"{p}self_attn.{name}") for name in ("q_norm", "k_norm")}
    return Block(**vars(gemma2.load_block(w, p, layer)), **heads)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    y = ops.linear(llama.attend(ops, a, q, k, v, layer), w.o)
    return mlp(ops, cfg, w, ops.rms_norm(y, w.attn_post_norm, cfg.norm_eps, add_to=x))


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int]]:
    """Names and [n] of a block's vectors."""
    return gemma2.norms(cfg, layer) | qwen3.head_norms(cfg, layer)


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    ropes = [a.rope for a in cfg.attentions]
    local = next((rope for rope in ropes if rope and rope != cfg.rope), None)
    mine = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": local.theta if local else 1e4,
    }
    two = gemma2.settings(cfg)
    del two["attn_logit_softcapping"]
    return two | mine
