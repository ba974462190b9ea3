"""Gemma 3n: Gemma 4's shared keys and inputs of layers, a residual of several streams of which a block reads
one, predicts and corrects the others (AltUp, Baykal et al. 2023), a second way around attention through few
channels (LAuReL, Menghani et al. 2024), and in the first layers gates that are mostly closed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import gemma2, gemma3, gemma4, llama, qwen3
from tinychat.models.gemma4 import GATE, INPUT_NORM, PROJECTION, SHARED, SHARED_NORM, TABLE, Inputs
from tinychat.models.llama import NAMES, biases
from tinychat.network import hf_config
from tinychat.network.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig, RopeConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, Metadata, Settings, Stack, WeightSource
from tinychat.network.hf_rope import rope_config
from tinychat.network.ops import Handle, Ops

__all__ = [
    "GGUF",
    "HF",
    "NORM_OFFSET",
    "biases",
    "forward",
    "linears",
    "load",
    "norms",
    "outside",
    "settings",
]

NORM_OFFSET = 0.0
ROUTER, PREDICT, CORRECT = (
    f"altup.{name}" for name in ("modality_router", "prediction_coefs", "correction_coefs")
)
ROUTER_NORM, CORRECT_SCALE = "altup.router_norm", "altup.correct_output_scale"
LEFT, RIGHT, LAUREL_NORM = (f"laurel.{name}" for name in ("linear_left", "linear_right", "post_laurel_norm"))
EMBED, UNEMBED = "model.altup_projections", "model.altup_unembed_projections"


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    for setting, needed in (("altup_active_idx", 0), ("altup_correct_scale", True)):
        if c[setting] != needed:
            raise UnsupportedModelError(
                f"The option {setting} = {c[setting]!r} is not supported in a Gemma 3n.",
                "A setting that is ignored gives garbage, so it is refused.",
            )
    slides = hf_config.slides(c, lambda i: bool((i + 1) % 5))
    local = {
        "rope_theta": c["rope_local_base_freq"],
        **((c.get("rope_parameters") or {}).get("sliding_attention") or {}),
    }
    near = replace(stack.attention, scale=1.0)
    near = replace(near, rope=rope_config({**c, "rope_parameters": local}, near.head_dim))
    far = replace(near, rope=stack.attention.rope, window=0)
    size, sparse = c["intermediate_size"], c.get("activation_sparsity_pattern")
    sizes = size if isinstance(size, list) else [size] * stack.n
    if sparse is None:
        sparse = [0.95 if stack.n > 10 and i < 10 else 0.0 for i in range(stack.n)]
    cut = [NormalDist().inv_cdf(part) if part > 0 else None for part in sparse]
    return _layers(stack, slides, stack.n - c["num_kv_shared_layers"], near, far, sizes, cut)


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    slides = m.flags("attention.sliding_window_pattern", stack.n, lambda i: bool((i + 1) % 5))
    rope = RopeConfig(float(m.number("rope.freq_base_swa", 10000.0)), stack.attention.head_dim)
    near = replace(stack.attention, scale=1.0, rope=rope)
    far = replace(stack.attention, scale=1.0, window=0)
    if m.number("altup.active_idx", 0):
        raise UnsupportedModelError(
            "The GGUF's blocks read another stream than the first.", "Such models are not supported."
        )
    cut = [by if math.isfinite(by) else None for by in m.numbers("activation_sparsity_scale", stack.n)]
    sizes = m.each("feed_forward_length", stack.n)
    own = stack.n - m.number("attention.shared_kv_layers", 15)
    return _layers(stack, slides, own, near, far, sizes, cut)


def _layers(
    stack: Stack,
    slides: Any,
    own: int,
    near: AttentionConfig,
    far: AttentionConfig,
    sizes: Sequence[int],
    cut: Sequence[float | None],
) -> tuple[LayerConfig, ...]:
    if len(sizes) < stack.n or len(cut) < stack.n:
        raise ValueError(f"{len(sizes)} sizes and {len(cut)} sparsities of {stack.n} layers")
    mixers = gemma4.shared(slides, stack.n, own, lambda i: near if slides(i) else far)
    return stack.layers(mixers, lambda i: DenseConfig(sizes[i], cut[i]))


def _constants_from_hf(c: Settings) -> dict[str, Any]:
    own = {"layer_inputs": c["hidden_size_per_layer_input"], "layer_vocab": c["vocab_size_per_layer_input"]}
    streams = {"streams": c["altup_num_inputs"], "laurel": c["laurel_rank"]}
    return gemma2.constants_from_hf(c) | own | streams


def _constants_from_gguf(m: Metadata) -> dict[str, Any]:
    shapes = m.shape("per_layer_token_embd.weight"), m.shape("blk.0.laurel_l.weight")
    own = {"layer_inputs": m.number("embedding_length_per_layer_input"), "layer_vocab": shapes[0][0]}
    streams = {"streams": m.number("altup.num_inputs"), "laurel": shapes[1][0]}
    return gemma2.constants_from_gguf(m, 30.0) | own | streams


def _router_norm(weight: np.ndarray) -> np.ndarray:
    """The router's norm: what files hold is divided by the hidden size besides."""
    return weight / np.float32(len(weight))


HF = {
    "Gemma3nForCausalLM": FromHF(
        gemma2.DEFAULTS
        | {"sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 32768}
        | {"vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256}
        | {"altup_active_idx": 0, "altup_correct_scale": True, "altup_num_inputs": 4, "laurel_rank": 64}
        | {"num_kv_shared_layers": 15, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": None},
        ("final_logit_softcapping",),
        windows=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        layers=_from_hf,
        constants=_constants_from_hf,
        tensors=(*hf_config.WRAPPED, (r"\.correct_output_scale$", ".correct_output_scale.weight")),
        vectors={CORRECT_SCALE: Kept(part=""), ROUTER_NORM: Kept(_router_norm, lambda a: a * len(a))},
        varied=True,
        unread=gemma4.UNREAD,
        model_type="gemma3n_text",
        wrappers=("Gemma3nForConditionalGeneration",),
    )
}
GGUF = {
    "gemma3n": FromGGUF(
        NAMES
        | gemma2.POST_NORMS
        | qwen3.HEAD_NORMS
        | {GATE: "inp_gate", PROJECTION: "proj", INPUT_NORM: "post_norm"}
        | {ROUTER: "altup_router", PREDICT: "altup_predict_coef", CORRECT: "altup_correct_coef"}
        | {ROUTER_NORM: "altup_router_norm", CORRECT_SCALE: "altup_correct_scale"}
        | {LEFT: "laurel_l", RIGHT: "laurel_r", LAUREL_NORM: "laurel_post_norm"}
        | {TABLE: "per_layer_token_embd", SHARED: "per_layer_model_proj", SHARED_NORM: "per_layer_proj_norm"}
        | {EMBED: "altup_proj", UNEMBED: "altup_unembd_proj"},
        options=("final_logit_softcapping",),
        layers=_from_gguf,
        constants=_constants_from_gguf,
        varied=True,
        vectors={ROUTER_NORM: _router_norm},
        unread=("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"),
    )
}


@dataclass(frozen=True)
class Block(gemma3.Block):
    """Gemma 3's, the layer's own input, what predicts and corrects streams, and the way around attention."""

    inputs: Inputs
    router_norm: Handle
    router: Handle
    predict: Handle
    correct: Handle
    correct_scale: Handle
    left: Handle
    right: Handle
    laurel_norm: Handle


@dataclass(frozen=True)
class Weights(gemma4.Weights):
    """Gemma 4's, and what makes streams of embeddings and one of these."""

    embeds: list[Handle]
    unembeds: list[Handle]


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    a = layer.attention
    names = [p + name for name, n in zip(llama.ATTENTION, a.projected, strict=False) if n]
    return Block(
        attn_norm=w.vector(p + "input_layernorm"),
        qkv=w.linear(*names),
        q_norm=w.vector(p + "self_attn.q_norm"),
        k_norm=w.vector(p + "self_attn.k_norm") if a.source < 0 else None,
        o=w.linear(p + "self_attn.o_proj"),
        attn_post_norm=w.vector(p + "post_attention_layernorm"),
        mlp_norm=w.vector(p + "pre_feedforward_layernorm"),
        gate_up=w.linear(p + "mlp.gate_proj", p + "mlp.up_proj"),
        down=w.linear(p + "mlp.down_proj"),
        mlp_post_norm=w.vector(p + "post_feedforward_layernorm"),
        inputs=Inputs(w.linear(p + GATE), w.linear(p + PROJECTION), w.vector(p + INPUT_NORM)),
        router_norm=w.vector(p + ROUTER_NORM),
        router=w.router(p + ROUTER),
        predict=w.router(p + PREDICT),
        correct=w.router(p + CORRECT),
        correct_scale=w.vector(p + CORRECT_SCALE),
        left=w.linear(p + LEFT),
        right=w.linear(p + RIGHT),
        laurel_norm=w.vector(p + LAUREL_NORM),
    )


def load(w: WeightSource, cfg: ModelConfig) -> Weights:
    """Ask the backend's loader `w` for every weight."""
    others = range(cfg.streams - 1)
    table, projection, norm = w.embedding(TABLE), w.linear(SHARED), w.vector(SHARED_NORM)
    embeds, unembeds = ([w.linear(f"{name}.{i}") for i in others] for name in (EMBED, UNEMBED))
    known = llama.load(w, cfg, load_block)
    return Weights(
        **vars(known),
        table=table,
        projection=projection,
        projection_norm=norm,
        embeds=embeds,
        unembeds=unembeds,
    )


def _factors(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, linear: Handle) -> Handle:
    """Factors of streams that the router finds for x [T, hidden]."""
    routed = ops.tanh(ops.linear(ops.rms_norm(x, w.router_norm, cfg.norm_eps), w.router))
    return ops.linear(routed, linear)


def block(ops: Ops, cfg: ModelConfig, w: Block, xs: list[Handle], layer: int, beside: Handle) -> list[Handle]:
    """One decoder block. xs: the streams, [T, hidden] each; beside: [T, layers · layer_inputs]."""
    eps, mlp = cfg.norm_eps, cfg.layers[layer].mlp
    assert isinstance(mlp, DenseConfig)
    xs = ops.mix_streams(xs, _factors(ops, cfg, w, xs[0], w.predict))
    m = ops.rms_norm(xs[0], w.attn_norm, eps)
    around = ops.norm_columns(ops.linear(ops.linear(m, w.left), w.right), w.laurel_norm, eps)
    y = ops.norm_columns(gemma4.attention(ops, cfg, w, m, layer), w.attn_post_norm, eps)
    x = ops.summed([xs[0], y, around, m], math.sqrt(0.5))
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, eps), w.gate_up)
    if mlp.cutoff is not None:
        gate_up = ops.cut_gates(gate_up, mlp.cutoff)
    x = ops.rms_norm(ops.linear(ops.gelu_mul(gate_up), w.down), w.mlp_post_norm, eps, add_to=x)
    xs = ops.correct_streams(xs, x, _factors(ops, cfg, w, x, w.correct))
    own = ops.linear(ops.times(xs[0], w.correct_scale), w.inputs.gate)
    own = ops.linear(ops.gelu_columns(own, beside, layer * cfg.layer_inputs), w.inputs.projection)
    return [xs[0], *(ops.rms_norm(own, w.inputs.norm, eps, add_to=x) for x in xs[1:])]


def forward(ops: Ops, cfg: ModelConfig, w: Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    x = ops.embed(w.embed, cfg.embed_scale)
    beside = gemma4.layer_inputs(ops, cfg, w, x)
    xs = [x, *(ops.resized(ops.linear(x, linear), x) for linear in w.embeds)]
    for layer, weights in enumerate(w.blocks):
        xs = block(ops, cfg, weights, xs, layer, beside)
    last = [ops.resized(ops.linear(x, linear), xs[0]) for x, linear in zip(xs[1:], w.unembeds, strict=True)]
    x = ops.summed([xs[0], *last], 1 / cfg.streams)
    return ops.lm_head(ops.rms_norm(x, w.norm, cfg.norm_eps), w.head, soft_cap=cfg.logit_soft_cap)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    p, h, n = f"model.layers.{layer}.", cfg.hidden_size, cfg.streams
    own = {
        ROUTER: (n, h),
        PREDICT: (n * n, n),
        CORRECT: (n, n),
        LEFT: (cfg.laurel, h),
        RIGHT: (h, cfg.laurel),
    }
    return gemma4.linears(cfg, layer) | {p + name: shape for name, shape in own.items()}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's vectors."""
    p = f"model.layers.{layer}."
    found = gemma4.norms(cfg, layer) | {
        p + n: (cfg.hidden_size,) for n in (ROUTER_NORM, CORRECT_SCALE, LAUREL_NORM)
    }
    del found[p + "layer_scalar"]
    return found


def outside(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Modules outside of the blocks: what makes inputs of layers, streams, and one of these again."""
    square = (cfg.hidden_size, cfg.hidden_size)
    streams = {f"{name}.{i}": square for name in (EMBED, UNEMBED) for i in range(cfg.streams - 1)}
    return gemma4.outside(cfg) | streams


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    near = next((a for a in cfg.attentions if a.window), cfg.attentions[0])
    cut = [layer.mlp.cutoff for layer in cfg.layers if isinstance(layer.mlp, DenseConfig)]
    return {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": [layer.mlp.size for layer in cfg.layers],
        "num_kv_shared_layers": sum(a.source >= 0 for a in cfg.attentions),
        "hidden_size_per_layer_input": cfg.layer_inputs,
        "vocab_size_per_layer_input": cfg.layer_vocab,
        "altup_num_inputs": cfg.streams,
        "laurel_rank": cfg.laurel,
        "activation_sparsity_pattern": [0.0 if by is None else NormalDist().cdf(by) for by in cut],
        "final_logit_softcapping": cfg.logit_soft_cap or None,
        "sliding_window": near.window or cfg.context_length,
        "layer_types": hf_config.layer_types(cfg),
        "rope_local_base_freq": near.rope.theta if near.rope else 1e4,
    }
