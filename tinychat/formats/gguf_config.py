"""What a GGUF's metadata says of its model, and what its tensors are called in each architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf_file import GGUFFile
from tinychat.network.config import LAYERS, ModelConfig, RopeConfig, decoder_layers
from tinychat.network.hf_rope import yarn_factors
from tinychat.text.tokenizer import TURN_ENDS

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NAMES = {
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
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_NAMES = _NAMES | {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# Metadata that changes what is computed.
_OPTIONS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "expert_gating_func",
    "expert_group_count",
    "expert_shared_count",
    "expert_weights_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.scaling.alpha",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)


# Values of these that say what is done anyway: softmax, times one, one group.
_HARMLESS = {"expert_gating_func": 1, "expert_weights_scale": 1.0, "expert_group_count": 1}


class Metadata:
    """The fields of one architecture: `arch.key` is asked for as `key`."""

    def __init__(self, file: GGUFFile, arch: str):
        self.file, self.arch = file, arch

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a list is refused."""
        value = self.file.fields.get(f"{self.arch}.{key}", default)
        if isinstance(value, list | np.ndarray):
            raise self.file.damaged(f"the field {self.arch}.{key} is a list")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """The value, which must be a number."""
        value = self.file.fields.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = "is missing" if value is None else f"is a {type(value).__name__}, not a number"
            raise self.file.damaged(f"the field {self.arch}.{key} {what}")
        return value


def _granite(m: Metadata) -> dict[str, Any]:
    return {
        "embed_scale": float(m.number("embedding_scale", 0) or 1),
        "residual_scale": float(m.number("residual_scale", 0) or 1),
        "attn_scale": float(m.number("attention.scale", 0)) or None,
        "logit_scale": 1 / float(m.number("logit_scale", 0) or 1),
    }


def _gemma(m: Metadata, period: int, largest: int) -> dict[str, Any]:
    hidden, heads, layers = (m.number(k) for k in ("embedding_length", "attention.head_count", "block_count"))
    period = m.number("attention.sliding_window_pattern", period)
    return {
        "embed_scale": math.sqrt(hidden),
        # the 27B of either generation scales by its hidden size, which only its depth tells
        "attn_scale": (hidden / heads) ** -0.5 if layers == largest else None,
        "windowed_layers": tuple(i for i in range(min(layers, 1024)) if (i + 1) % period),
    }


def _gemma2(m: Metadata) -> dict[str, Any]:
    caps = {
        "attn_soft_cap": float(m.number("attn_logit_softcapping", 50.0)),
        "logit_soft_cap": float(m.number("final_logit_softcapping", 30.0)),
    }
    return _gemma(m, 2, 46) | caps


def _gemma3(m: Metadata) -> dict[str, Any]:
    dim = m.number("attention.key_length", m.number("embedding_length") // m.number("attention.head_count"))
    return _gemma(m, 6, 62) | {
        "logit_soft_cap": float(m.number("final_logit_softcapping", 0.0)),
        "local_rope": RopeConfig(float(m.number("rope.freq_base_swa", 10000.0)), dim),
    }


def _mixtral(m: Metadata) -> dict[str, Any]:
    return _experts(m, m.number("feed_forward_length"))


def _qwen3_moe(m: Metadata) -> dict[str, Any]:
    return _experts(m, m.number("expert_feed_forward_length"))


def _experts(m: Metadata, size: int) -> dict[str, Any]:
    # llama.cpp makes the weights sum to one for both, whatever the model was trained with
    return {
        "n_experts": m.number("expert_count"),
        "n_experts_used": m.number("expert_used_count"),
        "expert_size": size,
        "norm_experts": bool(m.get("expert_weights_norm", True)),
    }


def _smollm3(m: Metadata) -> dict[str, Any]:
    # llama.cpp has the interval in its code, not in the file
    return {"unrotated_layers": tuple(range(3, min(m.number("block_count"), 1024), 4))}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    names        a block's modules: Hugging Face's name → GGUF's
    interleaved  rows of q and k are stored for rotating neighbours (x[2i], x[2i + 1])
    options      those of _OPTIONS that it has; `extra` reads them
    """

    family: str
    names: dict[str, str] = field(default_factory=lambda: _NAMES)
    interleaved: bool = False
    options: tuple[str, ...] = ()
    extra: Callable[[Metadata], dict[str, Any]] = lambda m: {}


MIXTRAL = Architecture("mixtral", _EXPERT_NAMES, True, ("expert_count",), _mixtral)
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", _NAMES | _QK_NORMS),
    "qwen3moe": Architecture(
        "qwen3_moe", _EXPERT_NAMES | _QK_NORMS, options=("expert_count",), extra=_qwen3_moe
    ),
    "phi3": Architecture("phi3", _NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    "smollm3": Architecture("smollm3", interleaved=True, extra=_smollm3),
    "olmo2": Architecture(
        "olmo2",
        _NAMES
        | _QK_NORMS
        | {
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
    "gemma2": Architecture(
        "gemma2",
        _GEMMA_NAMES,
        options=("attn_logit_softcapping", "final_logit_softcapping"),
        extra=_gemma2,
    ),
    "gemma3": Architecture(
        "gemma3", _GEMMA_NAMES | _QK_NORMS, options=("final_logit_softcapping",), extra=_gemma3
    ),
    "granite": Architecture(
        "granite",
        interleaved=True,
        options=("attention.scale", "embedding_scale", "logit_scale", "residual_scale"),
        extra=_granite,
    ),
}


def read_config(file: GGUFFile) -> tuple[Architecture, ModelConfig]:
    """Raises UnsupportedModelError for an architecture, option or rope scaling that is not known, by name."""
    name = file.fields.get("general.architecture")
    arch = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if arch is None:
        raise UnsupportedModelError(
            f"The GGUF architecture {name!r} is not supported.", f"Supported: {', '.join(ARCHITECTURES)}."
        )
    general, m = Metadata(file, "general"), Metadata(file, name)
    if name == "llama" and m.get("expert_count"):  # one name for both
        arch = MIXTRAL
    if general.get("type", "model") != "model":
        raise UnsupportedModelError(
            f"{file.path} holds a {general.get('type')}, not a model.", "Give the GGUF of the model itself."
        )
    parts = Metadata(file, "split").get("count", 1)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"{file.path} is one of {parts} parts.", "Join them with llama-gguf-split --merge."
        )
    for option in _OPTIONS:
        if option not in arch.options and m.get(option) not in (None, 0, _HARMLESS.get(option)):
            raise UnsupportedModelError(
                f"The GGUF sets {name}.{option}, which is not supported.",
                "A setting that is ignored gives garbage, so it is refused.",
            )
    try:
        return arch, _config(file, arch, m)
    except (ArithmeticError, TypeError, ValueError) as e:
        raise file.damaged(f"its metadata does not fit together: {e}") from e


def _config(file: GGUFFile, arch: Architecture, m: Metadata) -> ModelConfig:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.damaged("the tensor 'token_embd.weight' is missing or has the wrong shape")
    heads, hidden = m.number("attention.head_count"), m.number("embedding_length")
    if not heads:
        raise file.damaged("it has no attention heads")
    head_dim = m.number("attention.key_length", hidden // heads)
    if m.number("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            "The GGUF has keys and values of different lengths.", "Such models are not supported."
        )
    if head_dim % 2:
        raise file.damaged(f"its heads have {head_dim} dimensions, an odd number")
    rope = _rope(file, m, head_dim)
    context = m.number("context_length")
    if rope.dim != head_dim and arch.interleaved:
        raise UnsupportedModelError(
            f"The GGUF rotates {rope.dim} of {head_dim} dimensions of a head.",
            f"Partial rotation is not supported in a {arch.family} model.",
        )
    long: dict[str, Any] = {}
    if rope.kind == "longrope" and context > rope.original_context:
        factors = _factors(file, "rope_factors_long.weight", rope.dim)
        long = {"long_rope": replace(rope, factors=factors), "long_context": context}
        context = rope.original_context
    names, extra = file.tensors, arch.extra(m)
    window = m.number("attention.sliding_window", 0)
    if window > 0:
        extra.setdefault("windowed_layers", tuple(range(min(m.number("block_count"), 1024))))
        extra["window"] = window if window < context else None
    return ModelConfig(
        family=arch.family,
        hidden_size=hidden,
        layers=decoder_layers(
            m.number("block_count"),
            intermediate_size=m.number("feed_forward_length"),
            n_heads=heads,
            n_kv_heads=m.number("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope=rope,
            **{name: extra.pop(name) for name in LAYERS if name in extra},
        ),
        vocab_size=embedding.shape[0],
        context_length=context,
        norm_eps=float(m.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names and "blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        bos_id=_token_id(file, "bos"),
        eos_ids=_eos_ids(file),
        **extra,
        **long,
    )


def _rope(file: GGUFFile, m: Metadata, head_dim: int) -> RopeConfig:
    dim = m.number("rope.dimension_count", head_dim)
    base = dict(theta=float(m.number("rope.freq_base", 10000.0)), dim=dim)
    legacy = float(m.number("rope.scale_linear", 1.0))
    factor = float(m.number("rope.scaling.factor", legacy))
    if not (math.isfinite(factor) and factor >= 0):
        raise file.damaged(f"its rope scaling factor is {factor}")
    stored = [name for name in ROPE_TENSORS if name in file.tensors]
    kind = m.get("rope.scaling.type")
    if kind is None:
        kind = "longrope" if len(stored) == 2 else "linear" if legacy != 1.0 else "none"
    scaled = kind in ("linear", "yarn") and factor not in (0.0, 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"The rope scaling {kind!r} is not supported.", "Supported in GGUF: none, linear, yarn, longrope."
        )
    if (kind == "longrope") != (stored == list(ROPE_TENSORS[1:])) or (scaled and stored):
        raise UnsupportedModelError(
            f"The GGUF has the rope scaling {kind!r} and the tensors {stored}.",
            "They do not belong together.",
        )
    magnitude = float(m.number("rope.scaling.attn_factor", 1.0))
    if kind == "yarn" and scaled:
        original = m.number("rope.scaling.original_context_length", m.number("context_length"))
        if original <= 0 or not 1 < base["theta"] < math.inf or factor < 1:
            raise file.damaged("its rope scaling makes no sense")
        factors = yarn_factors(base["theta"], dim, factor, original)
        magnitude *= 1 + 0.1 * math.log(factor)
        return RopeConfig(
            kind="yarn",
            factor=factor,
            original_context=original,
            factors=factors,
            magnitude=magnitude,
            **base,
        )
    if kind == "longrope":
        original = m.number("rope.scaling.original_context_length")
        factors = _factors(file, "rope_factors_short.weight", dim)
        return RopeConfig(
            kind="longrope", original_context=original, factors=factors, magnitude=magnitude, **base
        )
    if magnitude != 1.0:
        raise UnsupportedModelError(
            f"The GGUF scales attention by {magnitude} without a rope scaling.", "That is not supported."
        )
    if stored:
        return RopeConfig(kind="factors", factors=_factors(file, stored[0], dim), **base)
    return RopeConfig(kind="linear", factor=factor, **base) if scaled else RopeConfig(**base)


def _factors(file: GGUFFile, name: str, dim: int) -> tuple[float, ...]:
    factors = file.floats(file.tensors[name]).reshape(-1)
    if factors.size != dim // 2 or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise file.damaged(f"{name} does not hold {dim // 2} positive numbers")
    return tuple(factors.tolist())


def _token_id(file: GGUFFile, name: str) -> int | None:
    value = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _eos_ids(file: GGUFFile) -> tuple[int, ...]:
    ids = {_token_id(file, "eos"), _token_id(file, "eot"), _token_id(file, "eom")} - {None}
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ends = set(TURN_ENDS)
        ids |= {i for i, text in enumerate(tokens) if text in ends}
    return tuple(sorted(ids))
