"""Gemma 4: Gemma 3 with norms of values in place of a scale, heads of another size in layers that see
everything, a factor for each layer. The last layers may attend to keys and values of earlier ones, small ones
add to each layer a row of an embedding of its own, large ones have experts beside the MLP (Gemma Team 2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import gemma2, gemma3, llama, mixtral, qwen3
from tinychat.models.gemma4_experts import (
    DENSE_NORM,
    EXPERT_SCALE,
    EXPERTS_NORM,
    EXPERTS_POST_NORM,
    ROUTER_NORM,
    Routed,
    load_routed,
    mlp_and_experts,
    router_norm,
    vectors,
)
from tinychat.models.llama import NAMES, biases
from tinychat.network import hf_config
from tinychat.network.config import (
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
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
GATE, PROJECTION, INPUT_NORM = "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"
TABLE, SHARED, SHARED_NORM = (
    f"model.{name}"
    for name in ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
)
UNREAD = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")  # in layers that use others' keys
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GLOBAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
STILL = 1e29  # what GGUF divides frequencies by, at least, of pairs that do not turn


def shared(
    slides: Callable[[int], bool], n: int, own: int, heads: Callable[[int], AttentionConfig]
) -> Callable[[int], AttentionConfig]:
    """Attention of layer i, of which those behind the first `own` attend to what the last one of these that
    is of their type has written. Raises ValueError where none is.
    """
    if not 0 < own <= n:
        raise ValueError(f"{n - own} of {n} layers share keys and values")
    last = {slides(i): i for i in range(own)}

    def of(i: int) -> AttentionConfig:
        if i < own:
            return heads(i)
        if slides(i) not in last:
            raise ValueError(f"layer {i} finds no layer to share keys and values with")
        return replace(heads(i), source=last[slides(i)], tied=False)

    return of


def _own_heads(c: Settings, i: int) -> tuple[int, int]:
    """Size and number of KV heads of a layer that sees everything."""
    listed = c.get("per_layer_config")
    own: Settings = {}
    if isinstance(listed, dict):  # its keys are numbers as texts, of which some begin with zeros
        own = {int(layer): said for layer, said in listed.items()}.get(i, {})
    else:
        kv = c.get("num_global_key_value_heads") if c["attention_k_eq_v"] else None
        own = {"head_dim": c["global_head_dim"], "num_key_value_heads": kv}
    strange = set(own) - {"head_dim", "num_key_value_heads"}
    if strange:
        raise UnsupportedModelError(
            f"The option per_layer_config with {', '.join(sorted(strange))} is not supported in a Gemma 4.",
            "A setting that is ignored gives garbage, so it is refused.",
        )
    return own.get("head_dim") or c["head_dim"], own.get("num_key_value_heads") or c["num_key_value_heads"]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    if (both := c.get("use_bidirectional_attention")) not in (None, False, "vision"):
        raise UnsupportedModelError(
            f"The option use_bidirectional_attention = {both!r} is not supported in a Gemma 4.",
            "A model that sees what follows a token writes no text.",
        )
    ropes = c.get("rope_parameters") or {"full_attention": GLOBAL, "sliding_attention": LOCAL}
    types = c.get("layer_types") or [
        "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(stack.n)
    ]
    types = [*types[: stack.n - 1], "full_attention"]  # as transformers has it
    slides = hf_config.slides({**c, "layer_types": types})

    def heads(i: int) -> AttentionConfig:
        near = replace(stack.attention, scale=1.0)
        if slides(i):
            rope = rope_config({**c, "rope_parameters": ropes["sliding_attention"]}, near.head_dim)
            return replace(near, rope=rope)
        size, kv = _own_heads(c, i)
        rope = rope_config({**c, "rope_parameters": ropes["full_attention"]}, size)
        return replace(
            near, head_dim=size, n_kv_heads=kv, rope=rope, window=0, tied=bool(c["attention_k_eq_v"])
        )

    own = stack.n - c["num_kv_shared_layers"]

    def mlp(i: int) -> DenseConfig | ExpertsConfig:
        size = stack.mlp.size * (2 if c["use_double_wide_mlp"] and i >= own else 1)
        if not c["enable_moe_block"]:
            return DenseConfig(size)
        return ExpertsConfig(c["num_experts"], c["top_k_experts"], c["moe_intermediate_size"], shared=size)

    return stack.layers(shared(slides, stack.n, own, heads), mlp)


def _constants_from_hf(c: Settings) -> dict[str, Any]:
    found = gemma2.constants_from_hf(c)
    if c["hidden_size_per_layer_input"]:
        found |= {
            "layer_inputs": c["hidden_size_per_layer_input"],
            "layer_vocab": c["vocab_size_per_layer_input"],
        }
    return found


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    slides = m.flags("attention.sliding_window_pattern", stack.n, lambda i: bool((i + 1) % 6))
    kv, sizes = (m.each(key, stack.n) for key in ("attention.head_count_kv", "feed_forward_length"))
    far = replace(stack.attention, scale=1.0, window=0, rope=_proportional(stack.attention.rope))
    near = replace(
        stack.attention,
        scale=1.0,
        head_dim=m.number("attention.key_length_swa"),
        rope=RopeConfig(
            float(m.number("rope.freq_base_swa", 10000.0)),
            m.number("rope.dimension_count_swa", m.number("attention.key_length_swa")),
        ),
    )
    own = stack.n - m.number("attention.shared_kv_layers", 0)

    def heads(i: int) -> AttentionConfig:
        tied = not slides(i) and not m.shape(f"blk.{i}.attn_v.weight")
        return replace(near if slides(i) else far, n_kv_heads=kv[i], tied=tied)

    def mlp(i: int) -> DenseConfig | ExpertsConfig:
        if not m.get("expert_count"):
            return DenseConfig(sizes[i])
        n, taken, size = (m.number(f"expert_{key}") for key in ("count", "used_count", "feed_forward_length"))
        return ExpertsConfig(n, taken, size, shared=sizes[i])

    return stack.layers(shared(slides, stack.n, own, heads), mlp)


def _proportional(rope: RopeConfig | None) -> RopeConfig | None:
    """GGUF divides the frequencies of pairs that do not turn by a huge number."""
    if rope is None or rope.kind != "factors":
        return rope
    turned = sum(factor < STILL for factor in rope.factors)
    if any(factor != 1 for factor in rope.factors[:turned]):
        return rope
    return RopeConfig(rope.theta, rope.dim, "proportional", turned=turned)


def _constants_from_gguf(m: Metadata) -> dict[str, Any]:
    found = gemma2.constants_from_gguf(m, 0.0)
    if inputs := m.number("embedding_length_per_layer_input", 0):
        found |= {"layer_inputs": inputs, "layer_vocab": m.shape("per_layer_token_embd.weight")[0]}
    return found


HF = {
    "Gemma4ForCausalLM": FromHF(
        {
            "tie_word_embeddings": True,
            "vocab_size": 262144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
            "vocab_size_per_layer_input": 262144,
            "hidden_size_per_layer_input": 256,
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
        },
        ("final_logit_softcapping", "use_bidirectional_attention", "num_experts"),
        windows=True,
        partial_rope=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        layers=_from_hf,
        constants=_constants_from_hf,
        tensors=(
            *hf_config.WRAPPED,
            (r"\.(layer_scalar|router\.scale|router\.per_expert_scale)$", r".\1.weight"),
            (r"(\.layers\.\d+)\.experts\.", r"\1.mlp.experts."),
            (r"\.router\.proj\.", ".mlp.gate."),
        ),
        vectors={
            "layer_scalar": Kept(part=""),
            EXPERT_SCALE: Kept(part=""),
            ROUTER_NORM: Kept(router_norm, lambda a: a * len(a) ** 0.5, part=""),
        },
        unread=UNREAD,
        model_type="gemma4_text",
        wrappers=("Gemma4ForConditionalGeneration",),
    )
}
HF["Gemma4UnifiedForCausalLM"] = replace(
    HF["Gemma4ForCausalLM"],
    defaults=HF["Gemma4ForCausalLM"].defaults
    | {"hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144},
    model_type="gemma4_unified_text",
    wrappers=("Gemma4UnifiedForConditionalGeneration",),
)
GGUF = {
    "gemma4": FromGGUF(
        NAMES
        | gemma2.POST_NORMS
        | qwen3.HEAD_NORMS
        | {
            "layer_scalar": "layer_output_scale",
            GATE: "inp_gate",
            PROJECTION: "proj",
            INPUT_NORM: "post_norm",
        }
        | {ROUTER_NORM: "router_scale", EXPERT_SCALE: "expert_scale", DENSE_NORM: "post_ffw_norm_1"}
        | {
            EXPERTS_NORM: "pre_ffw_norm_2",
            EXPERTS_POST_NORM: "post_ffw_norm_2",
            mixtral.ROUTER: "ffn_gate_inp",
        }
        | {f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "gate_up", "down")}
        | {TABLE: "per_layer_token_embd", SHARED: "per_layer_model_proj", SHARED_NORM: "per_layer_proj_norm"},
        tensors=(
            (r"^(blk\.\d+)\.ffn_gate_inp\.scale$", r"\1.router_scale.weight"),
            (r"^(blk\.\d+)\.ffn_down_exps\.scale$", r"\1.expert_scale.weight"),
        ),
        options=("final_logit_softcapping", "expert_count"),
        layers=_from_gguf,
        constants=_constants_from_gguf,
        varied=True,
        vectors={ROUTER_NORM: router_norm},
        unread=("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"),
    )
}


@dataclass(frozen=True)
class Inputs:
    """What a block has for its own input: from the residual, and back."""

    gate: Handle
    projection: Handle
    norm: Handle


@dataclass(frozen=True)
class Block(gemma3.Block):
    """Gemma 3's, a factor, what small models have for a layer's own input, and large ones of experts. k_norm:
    of layers with keys.
    """

    scalar: Handle
    inputs: Inputs | None
    routed: Routed | None


@dataclass(frozen=True)
class Weights(llama.Weights):
    """Llama's, and what makes the inputs of all layers, where they have their own."""

    table: Handle | None
    projection: Handle | None
    projection_norm: Handle | None


def load_block(w: WeightSource, p: str, layer: LayerConfig, inputs: bool) -> Block:
    """The block whose modules' names begin with `p`; inputs: whether layers have their own."""
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
        scalar=w.vector(p + "layer_scalar"),
        inputs=Inputs(w.linear(p + GATE), w.linear(p + PROJECTION), w.vector(p + INPUT_NORM))
        if inputs
        else None,
        routed=load_routed(w, p, layer.mlp) if isinstance(layer.mlp, ExpertsConfig) else None,
    )


def load(w: WeightSource, cfg: ModelConfig) -> Weights:
    """Ask the backend's loader `w` for every weight."""
    inputs = cfg.layer_inputs > 0
    table, projection = (w.embedding(TABLE), w.linear(SHARED)) if inputs else (None, None)
    norm = w.vector(SHARED_NORM) if inputs else None
    known = llama.load(w, cfg, lambda w, p, layer: load_block(w, p, layer, inputs))
    return Weights(**vars(known), table=table, projection=projection, projection_norm=norm)


def attention(ops: Ops, cfg: ModelConfig, w: gemma3.Block, x: Handle, layer: int) -> Handle:
    """What the layer `layer` attends to, of the normed rows x [T, hidden]: [T, hidden]."""
    a = cfg.layers[layer].attention
    q, k, v = ops.split_heads(ops.linear(x, w.qkv), a)
    q, k = ops.norm_heads(q, k, w.q_norm, w.k_norm, cfg.norm_eps)
    if a.source < 0:
        v = ops.norm_values(v, cfg.norm_eps)
    return ops.linear(llama.attend(ops, a, q, k, v, layer), w.o)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int, beside: Handle | None) -> Handle:
    """One decoder block. x: [T, hidden]; beside: the inputs of all layers [T, layers · layer_inputs]."""
    eps = cfg.norm_eps
    y = attention(ops, cfg, w, ops.rms_norm(x, w.attn_norm, eps), layer)
    x, mlp = ops.rms_norm(y, w.attn_post_norm, eps, add_to=x), cfg.layers[layer].mlp
    if w.routed is not None and isinstance(mlp, ExpertsConfig):
        x = mlp_and_experts(ops, cfg, w, w.routed, x, mlp)
    else:
        x = gemma2.mlp(ops, cfg, w, x)
    if w.inputs is not None:
        own = ops.gelu_columns(ops.linear(x, w.inputs.gate), beside, layer * cfg.layer_inputs)
        x = ops.rms_norm(ops.linear(own, w.inputs.projection), w.inputs.norm, eps, add_to=x)
    return ops.scaled(x, w.scalar)


def layer_inputs(ops: Ops, cfg: ModelConfig, w: Weights, x: Handle) -> Handle:
    """Inputs of all layers: rows of their embedding, and what the embeddings x say: [T, layers · n]."""
    # the projection is divided by √hidden before its norm, which only its epsilon feels
    y = ops.norm_columns(ops.linear(x, w.projection), w.projection_norm, cfg.norm_eps * cfg.hidden_size)
    return ops.embed_onto(y, w.table, math.sqrt(cfg.layer_inputs), math.sqrt(0.5))


def forward(ops: Ops, cfg: ModelConfig, w: Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    x = ops.embed(w.embed, cfg.embed_scale)
    beside = layer_inputs(ops, cfg, w, x) if cfg.layer_inputs else None
    for layer, weights in enumerate(w.blocks):
        x = block(ops, cfg, weights, x, layer, beside)
    return ops.lm_head(ops.rms_norm(x, w.norm, cfg.norm_eps), w.head, soft_cap=cfg.logit_soft_cap)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    own = zip(llama.ATTENTION, (*a.projected, 1), strict=True)
    missing = [p + name for name, n in own if not n]
    mlp, h = cfg.layers[layer].mlp, cfg.hidden_size
    found = {name: shape for name, shape in llama.linears(cfg, layer).items() if name not in missing}
    if isinstance(mlp, ExpertsConfig):
        f = mlp.shared
        found |= {p + name: s for name, s in zip(llama.MLP, ((f, h), (f, h), (h, f)), strict=True)}
        found |= mixtral.expert_linears(cfg, layer)
    if cfg.layer_inputs:
        found[p + GATE] = (cfg.layer_inputs, cfg.hidden_size)
        found[p + PROJECTION] = (cfg.hidden_size, cfg.layer_inputs)
    return found


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's vectors."""
    a, p = cfg.layers[layer].attention, f"model.layers.{layer}."
    found: dict[str, tuple[int, ...]] = {**gemma3.norms(cfg, layer), p + "layer_scalar": (1,)}
    if a.source >= 0:
        del found[p + "self_attn.k_norm"]
    if cfg.layer_inputs:
        found[p + INPUT_NORM] = (cfg.hidden_size,)
    if isinstance(mlp := cfg.layers[layer].mlp, ExpertsConfig):
        found |= vectors(cfg, p, mlp)
    return found


def outside(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Modules outside of the blocks: what makes the inputs of layers."""
    if not cfg.layer_inputs:
        return {}
    n = cfg.n_layers * cfg.layer_inputs
    return {TABLE: (cfg.layer_vocab, n), SHARED: (n, cfg.hidden_size), SHARED_NORM: (cfg.layer_inputs,)}


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    near = next((a for a in cfg.attentions if a.window), cfg.attentions[0])
    far = next((a for a in cfg.attentions if not a.window), near)
    own = [layer for layer in cfg.layers if layer.attention.source < 0]
    ropes = {"full_attention": _rope_settings(far.rope), "sliding_attention": _rope_settings(near.rope)}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": near.head_dim,
        "num_key_value_heads": near.n_kv_heads,
        "global_head_dim": far.head_dim,
        "num_global_key_value_heads": far.n_kv_heads,
        "attention_k_eq_v": far.tied,
        "num_kv_shared_layers": cfg.n_layers - len(own),
        "intermediate_size": own[0].mlp.size,
        "use_double_wide_mlp": cfg.layers[-1].mlp.size > own[0].mlp.size,
        "hidden_size_per_layer_input": cfg.layer_inputs,
        "vocab_size_per_layer_input": cfg.layer_vocab or cfg.vocab_size,
        "final_logit_softcapping": cfg.logit_soft_cap or None,
        "sliding_window": near.window or cfg.context_length,
        "layer_types": hf_config.layer_types(cfg),
        "rope_scaling": ropes,  # the older name, which transformers looks at first
        "partial_rotary_factor": None,
        "rope_parameters": ropes,
    }


def _rope_settings(rope: RopeConfig | None) -> Settings:
    if rope is None or rope.kind != "proportional":
        return {**LOCAL, "rope_theta": rope.theta if rope else 1e4}
    return {**GLOBAL, "rope_theta": rope.theta, "partial_rotary_factor": 2 * rope.turned / rope.dim}
