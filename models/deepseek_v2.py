"""DeepSeek-V2: attention whose keys and values are made of one short row of each token, the only thing that
is cached (latent attention), and small experts beside one that every token takes (DeepSeek-AI 2024).

A head's keys are W_UK · row and its values W_UV · row, so W_UK goes into the query and W_UV behind the
weighted sum of rows: attention is over the rows themselves. Prompts are read in this form too, since the
other one rounds differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tinychat.base.errors import UnsupportedModelError
from tinychat.models import llama, mixtral
from tinychat.models.llama import NORM_OFFSET
from tinychat.network.config import AttentionConfig, DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Metadata, Part, Settings, Stack, WeightSource
from tinychat.network.hf_rope import score_magnitude
from tinychat.network.latent import LatentConfig
from tinychat.network.ops import Handle, Ops

__all__ = ["GGUF", "HF", "NORM_OFFSET", "biases", "forward", "linears", "load", "norms", "settings"]

EPS = 1e-6  # of the norms of compressed rows, whatever the config says of the others
SHARED = "mlp.shared_experts."
DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 1.0,
}
OPTIONS = ("n_group", "n_routed_experts", "n_shared_experts", "num_experts", "num_local_experts")


def latent_of(layer: LayerConfig) -> LatentConfig:
    """The parts of a layer's rows."""
    assert layer.attention.latent is not None
    return layer.attention.latent


PARTS = {
    "self_attn.k_b_proj": Part(
        "self_attn.kv_b_proj",
        lambda layer: latent_of(layer).key_rows(layer.attention.n_heads),
        lambda layer: layer.attention.n_heads,
    ),
    "self_attn.v_b_proj": Part(
        "self_attn.kv_b_proj", lambda layer: latent_of(layer).value_rows(layer.attention.n_heads)
    ),
}


def attention_from_hf(c: Settings, stack: Stack) -> AttentionConfig:
    """The attention of each layer."""
    latent = LatentConfig(
        c["kv_lora_rank"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
        c["q_lora_rank"] or 0,
        bool(c.get("rope_interleave", True)),
    )
    rope = stack.attention.rope
    assert rope is not None
    scale = latent.query**-0.5 * score_magnitude(c, rope)
    return AttentionConfig(stack.attention.n_heads, 1, latent.row, rope, scale=scale, latent=latent)


def experts_from_hf(c: Settings) -> ExpertsConfig:
    """The experts of a layer, with neither groups nor a rule for their weights."""
    size = c["moe_intermediate_size"]
    some = ExpertsConfig(c["n_routed_experts"], c["num_experts_per_tok"], size, normalize=False)
    scale = float(c["routed_scaling_factor"])
    return replace(some, shared=size * (c["n_shared_experts"] or 0), scale=scale)


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    some, method = experts_from_hf(c), c["topk_method"]
    if method not in ("greedy", "group_limited_greedy") or c["norm_topk_prob"]:
        raise UnsupportedModelError(
            f"The router topk_method = {method!r} with norm_topk_prob = {c['norm_topk_prob']!r} is not"
            " supported in a DeepseekV2ForCausalLM.",
            "Supported: greedy and group_limited_greedy, without norm_topk_prob.",
        )
    if method == "group_limited_greedy":
        some = replace(some, groups=c["n_group"], taken_groups=c["topk_group"])
    a, dense = attention_from_hf(c, stack), c["first_k_dense_replace"]
    return stack.layers(lambda i: a, lambda i: stack.mlp if i < dense else some)


HF = {
    "DeepseekV2ForCausalLM": FromHF(
        DEFAULTS
        | {
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "topk_method": "greedy",
        },
        OPTIONS,
        partial_rope=True,
        layers=_from_hf,
        parts=PARTS,
        head_dim="qk_rope_head_dim",
    )
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "self_attn.kv_b_proj": "attn_kv_b",
    SHARED + "gate_proj": "ffn_gate_shexp",
    SHARED + "up_proj": "ffn_up_shexp",
    SHARED + "down_proj": "ffn_down_shexp",
    mixtral.BIAS: "exp_probs_b",
}


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    rotated, rope = m.number("rope.dimension_count"), stack.attention.rope
    query = m.number("attention.key_length_mla", m.number("attention.key_length", 0))
    latent = LatentConfig(
        m.number("attention.kv_lora_rank"),
        query - rotated,
        rotated,
        m.number("attention.value_length_mla", m.number("attention.value_length", 0)),
        0 if m.shape("blk.0.attn_q.weight") else m.number("attention.q_lora_rank"),
    )
    scale = latent.query**-0.5
    if (
        rope is not None
        and rope.kind == "yarn"
        and (told := m.number("rope.scaling.yarn_log_multiplier", 0.0))
    ):
        # a tenth of mscale_all_dim, which is mscale too: rotated parts keep their magnitude, scores do not
        scale *= (1 + told * math.log(rope.factor)) ** 2
        rope = replace(rope, magnitude=float(m.number("rope.scaling.attn_factor", 1.0)))
    a = AttentionConfig(stack.attention.n_heads, 1, latent.row, rope, scale=scale, latent=latent)
    dense = m.number("leading_dense_block_count", 0)
    if dense >= stack.n:
        return stack.layers(lambda i: a)
    size, biased = m.number("expert_feed_forward_length"), bool(m.shape(f"blk.{dense}.exp_probs_b.bias"))
    some = ExpertsConfig(
        m.number("expert_count"),
        m.number("expert_used_count"),
        size,
        normalize=bool(m.get("expert_weights_norm", False)),
        shared=size * m.number("expert_shared_count", 0),
        sigmoid=m.number("expert_gating_func", 2 if biased else 1) == 2,
        biased=biased,
        scale=float(m.number("expert_weights_scale", 0.0)) or 1.0,
        groups=m.number("expert_group_count", 0) or 1,
        taken_groups=m.number("expert_group_used_count", 0) or 1,
    )
    return stack.layers(lambda i: a, lambda i: stack.mlp if i < dense else some)


GGUF = {
    "deepseek2": FromGGUF(
        mixtral.EXPERT_NAMES | NAMES,
        heaped=("self_attn.k_b_proj", "self_attn.v_b_proj"),
        options=(
            "expert_count",
            "expert_gating_func",
            "expert_group_count",
            "expert_shared_count",
            "expert_weights_scale",
        ),
        layers=_from_gguf,
        tensors=((r"\.exp_probs_b\.bias$", ".exp_probs_b.weight"),),
    )
}


@dataclass(frozen=True)
class Attention:
    """Weights of a layer's attention, as the backend's handles. q_a and q_norm are None where queries are not
    compressed.
    """

    norm: Handle
    q_a: Handle | None
    q_norm: Handle | None
    q: Handle
    kv_a: Handle
    kv_norm: Handle
    k_b: Handle
    v_b: Handle
    o: Handle


@dataclass(frozen=True)
class Mlp:
    """Weights of an MLP, as the backend's handles."""

    gate_up: Handle
    down: Handle


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block, as the backend's handles: experts with the MLP that all tokens take, or
    one of both.
    """

    attention: Attention
    mlp_norm: Handle
    experts: mixtral.Experts | None
    mlp: Mlp | None


def load_attention(w: WeightSource, p: str, layer: LayerConfig) -> Attention:
    """The attention of the block whose modules' names begin with `p`."""
    a, compressed = p + "self_attn.", latent_of(layer).query_rank
    return Attention(
        norm=w.vector(p + "input_layernorm"),
        q_a=w.linear(a + "q_a_proj") if compressed else None,
        q_norm=w.vector(a + "q_a_layernorm") if compressed else None,
        q=w.linear(a + ("q_b_proj" if compressed else "q_proj")),
        kv_a=w.linear(a + "kv_a_proj_with_mqa"),
        kv_norm=w.vector(a + "kv_a_layernorm"),
        k_b=w.linear(a + "k_b_proj"),
        v_b=w.linear(a + "v_b_proj"),
        o=w.linear(a + "o_proj"),
    )


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> Block:
    """The block whose modules' names begin with `p`."""
    attention, norm = load_attention(w, p, layer), w.vector(p + "post_attention_layernorm")
    some = isinstance(layer.mlp, ExpertsConfig)
    experts = mixtral.load_experts(w, p, mixtral.experts_of(layer)) if some else None
    if isinstance(layer.mlp, ExpertsConfig) and not layer.mlp.shared:
        return Block(attention, norm, experts, None)
    m = p + (SHARED if some else "mlp.")
    mlp = Mlp(w.linear(m + "gate_proj", m + "up_proj"), w.linear(m + "down_proj"))
    return Block(attention, norm, experts, mlp)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def attention(ops: Ops, cfg: ModelConfig, w: Attention, x: Handle, layer: int) -> Handle:
    """x [T, hidden] and what its attention adds."""
    a = cfg.layers[layer].attention
    h = ops.rms_norm(x, w.norm, cfg.norm_eps)
    row = ops.linear(h, w.kv_a)
    q = ops.linear(h if w.q_a is None else ops.rms_norm(ops.linear(h, w.q_a), w.q_norm, EPS), w.q)
    absorbed = ops.head_linear(q, w.k_b, a.n_heads)
    rows = ops.latent_attention(q, absorbed, row, w.kv_norm, EPS, a, layer)
    return ops.linear(ops.head_linear(rows, w.v_b, a.n_heads), w.o, add_to=x)


def block(ops: Ops, cfg: ModelConfig, w: Block, x: Handle, layer: int) -> Handle:
    """One pre-norm decoder block. x: [T, hidden]."""
    x = attention(ops, cfg, w.attention, x, layer)
    m = ops.rms_norm(x, w.mlp_norm, cfg.norm_eps)
    if w.experts is not None:
        x = mixtral.experts(ops, mixtral.experts_of(cfg.layers[layer]), w.experts, m, add_to=x)
    return x if w.mlp is None else ops.linear(ops.silu_mul(ops.linear(m, w.mlp.gate_up)), w.mlp.down, x)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    own, h, p = cfg.layers[layer], cfg.hidden_size, f"model.layers.{layer}."
    n, latent, mlp = own.attention.n_heads, latent_of(own), own.mlp
    shapes = {
        "kv_a_proj_with_mqa": (latent.row, h),
        "k_b_proj": (n * latent.rank, latent.plain),
        "v_b_proj": (n * latent.value, latent.rank),
        "o_proj": (h, n * latent.value),
    }
    if latent.query_rank:
        shapes |= {"q_a_proj": (latent.query_rank, h), "q_b_proj": (n * latent.query, latent.query_rank)}
    else:
        shapes |= {"q_proj": (n * latent.query, h)}
    found = {f"{p}self_attn.{name}": shape for name, shape in shapes.items()}
    f = mlp.shared if isinstance(mlp, ExpertsConfig) else mlp.size
    if isinstance(mlp, ExpertsConfig):
        found |= mixtral.expert_linears(cfg, layer)
    names = [
        p + (SHARED if isinstance(mlp, ExpertsConfig) else "mlp.") + part for part in ("gate", "up", "down")
    ]
    return found | {f"{m}_proj": s for m, s in zip(names, ((f, h), (f, h), (h, f)), strict=True) if f}


def norms(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else a block has."""
    own, p = cfg.layers[layer], f"model.layers.{layer}."
    latent, found = latent_of(own), dict[str, tuple[int, ...]](llama.norms(cfg, layer))
    found[p + "self_attn.kv_a_layernorm"] = (latent.rank,)
    if latent.query_rank:
        found[p + "self_attn.q_a_layernorm"] = (latent.query_rank,)
    if isinstance(own.mlp, ExpertsConfig) and own.mlp.biased:
        found[p + mixtral.BIAS] = (own.mlp.n,)
    return found


def biases(cfg: ModelConfig) -> tuple[str, ...]:
    """Linears that must have a bias, by their names inside a block."""
    attention = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
    shared = tuple(SHARED + name.removeprefix("mlp.") for name in llama.MLP)
    return (attention if cfg.attention_bias else ()) + ((*llama.MLP, *shared) if cfg.mlp_bias else ())


def latent_settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for the attention and the experts of such a model."""
    latent, mlps = latent_of(cfg.layers[0]), [layer.mlp for layer in cfg.layers]
    mine: Settings = {
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": latent.plain,
        "qk_rope_head_dim": latent.rotated,
        "v_head_dim": latent.value,
        "head_dim": latent.rotated,
        "num_key_value_heads": cfg.layers[0].attention.n_heads,
        "partial_rotary_factor": None,
        "first_k_dense_replace": sum(isinstance(m, DenseConfig) for m in mlps),
    }
    some = next((m for m in mlps if isinstance(m, ExpertsConfig)), None)
    if some is None:
        return mine
    return mine | {
        "n_routed_experts": some.n,
        "num_experts_per_tok": some.taken,
        "moe_intermediate_size": some.size,
        "n_shared_experts": some.shared // some.size,
        "norm_topk_prob": some.normalize,
        "routed_scaling_factor": some.scale,
        "n_group": some.groups,
        "topk_group": some.taken_groups,
    }


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    grouped = cfg.layers[-1].mlp
    limited = isinstance(grouped, ExpertsConfig) and grouped.groups > 1
    return latent_settings(cfg) | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy" if limited else "greedy",
    }
