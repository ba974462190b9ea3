"""Reader of a GGUF's metadata: the model's config, and the names of its tensors in each architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf_file import GGUFFile
from tinychat.models import FAMILIES
from tinychat.network.config import MOST_LAYERS, AttentionConfig, DenseConfig, ModelConfig, RopeConfig
from tinychat.network.family import FromGGUF, Stack
from tinychat.network.hf_rope import yarn_factors
from tinychat.text.tokenizer import TURN_ENDS

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
FURTHER = "nextn_predict_layers"  # layers behind all others that predict further tokens; they are not read
# Metadata that changes what is computed.
OPTIONS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.temperature_scale",
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
    "rope.scaling.yarn_ext_factor",
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

    def flags(self, key: str, n: int, otherwise: Callable[[int], bool]) -> Callable[[int], bool]:
        """What a list of n truth values says of layer i; `otherwise` where there is none."""
        value = self.file.fields.get(f"{self.arch}.{key}")
        if value is None:
            return otherwise
        given = np.asarray(value) if isinstance(value, list | np.ndarray) else np.zeros(0)
        if given.dtype.kind not in "biu" or given.ndim != 1 or len(given) < n or (given > 1).any():
            raise self.file.damaged(f"the field {self.arch}.{key} is no list of {n} truth values")
        return lambda i: bool(given[i])

    def each(self, key: str, n: int) -> list[int]:
        """A whole number for each of n layers: a list of them, or one for all."""
        value = self.file.fields.get(f"{self.arch}.{key}")
        listed: Any = value.tolist() if isinstance(value, np.ndarray) else value
        known = type(n) is int and 0 < n <= MOST_LAYERS
        values: list[Any] = listed if isinstance(listed, list) else [listed] * n if known else []
        if not known or len(values) < n or not all(type(v) in (int, bool) for v in values):
            raise self.file.damaged(f"the field {self.arch}.{key} is not a whole number for each layer")
        return [int(v) for v in values[:n]]

    def numbers(self, key: str, n: int) -> list[float]:
        """A list of n numbers, infinite ones too."""
        value = self.file.fields.get(f"{self.arch}.{key}")
        given = np.asarray(value) if isinstance(value, list | np.ndarray) else np.zeros(0)
        if given.dtype.kind not in "iuf" or given.ndim != 1 or len(given) < n:
            raise self.file.damaged(f"the field {self.arch}.{key} is no list of {n} numbers")
        return [float(v) for v in given[:n]]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor of the file; () where there is none."""
        found = self.file.tensors.get(tensor)
        return found.shape if found else ()


ARCHITECTURES: dict[str, list[tuple[str, FromGGUF]]] = {
    name: [(family, module.GGUF[name]) for family, module in FAMILIES.items() if name in module.GGUF]
    for form in FAMILIES.values()
    for name in form.GGUF
}


def read_config(file: GGUFFile) -> tuple[FromGGUF, ModelConfig]:
    """Names of the file's tensors, and its config.

    Raises UnsupportedModelError for an architecture, option or rope scaling that is not known, by name.
    """
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"The GGUF architecture {name!r} is not supported.", f"Supported: {', '.join(ARCHITECTURES)}."
        )
    general, m = Metadata(file, "general"), Metadata(file, name)
    # of families that share the name, the one that knows its own; else the one that does not ask
    known = sorted(ARCHITECTURES[name], key=lambda entry: entry[1].when is None)
    family, form = next((f, form) for f, form in known if form.when is None or form.when(m))
    if general.get("type", "model") != "model":
        raise UnsupportedModelError(
            f"{file.path} holds a {general.get('type')}, not a model.", "Give the GGUF of the model itself."
        )
    for option in OPTIONS:
        if option not in form.options and m.get(option) not in (None, 0, _HARMLESS.get(option)):
            raise UnsupportedModelError(
                f"The GGUF sets {name}.{option}, which is not supported.",
                "A setting that is ignored gives garbage, so it is refused.",
            )
    try:
        return form, _config(file, family, form, m)
    except (ArithmeticError, TypeError, ValueError) as e:
        raise file.damaged(f"its metadata does not fit together: {e}") from e


def _config(file: GGUFFile, family: str, form: FromGGUF, m: Metadata) -> ModelConfig:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.damaged("the tensor 'token_embd.weight' is missing or has the wrong shape")
    heads, hidden = m.number("attention.head_count"), m.number("embedding_length")
    if not heads:
        raise file.damaged("it has no attention heads")
    head_dim = m.number("attention.key_length", hidden // heads)
    latent = bool(m.get("attention.kv_lora_rank"))
    if not latent and m.number("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            "The GGUF has keys and values of different lengths.", "Such models are not supported."
        )
    if head_dim % 2:
        raise file.damaged(f"its heads have {head_dim} dimensions, an odd number")
    rope = _rope(file, m, head_dim)
    context = m.number("context_length")
    long: dict[str, Any] = {}
    if rope.kind == "longrope" and context > rope.original_context:
        factors = _factors(file, "rope_factors_long.weight", rope.dim)
        long = {"long_rope": replace(rope, factors=factors), "long_context": context}
        context = rope.original_context
    window = m.number("attention.sliding_window", 0)
    attention = AttentionConfig(
        heads,
        _kv_heads(m, heads, form.varied),
        head_dim,
        rope,
        window if 0 < window < context else 0,
    )
    n = m.number("block_count") - m.number(FURTHER, 0)
    size = (
        next(filter(None, m.each("feed_forward_length", n)), 0)  # of the first layer that has an MLP
        if form.varied
        else m.number("feed_forward_length", m.get("expert_feed_forward_length"))
    )
    stack = Stack(n, attention, DenseConfig(size))
    names = file.tensors
    fields: dict[str, Any] = dict(
        family=family,
        hidden_size=hidden,
        layers=form.layers(m, stack),
        vocab_size=embedding.shape[0],
        context_length=context,
        norm_eps=float(m.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names and "blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        bos_id=_token_id(file, "bos"),
        eos_ids=_eos_ids(file),
        **long,
    )
    return ModelConfig(**{**fields, **form.constants(m)})


def _kv_heads(m: Metadata, heads: int, varied: bool) -> int:
    """KV heads of the layers that attend: those of a list that are not 0; of the first if they may differ."""
    if f"{m.arch}.attention.head_count_kv" not in m.file.fields:
        return heads
    given = m.each("attention.head_count_kv", m.number("block_count"))
    alike = set(filter(None, given))
    alike = set(list(filter(None, given))[:1]) if varied else alike
    if len(alike) > 1:
        raise UnsupportedModelError(
            f"The GGUF has layers of {' and '.join(map(str, sorted(alike)))} KV heads.",
            "Such models are not supported.",
        )
    return alike.pop() if alike else 0


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
        fast, slow = (m.number(f"rope.scaling.yarn_beta_{end}", n) for end, n in (("fast", 32), ("slow", 1)))
        factors = yarn_factors(base["theta"], dim, factor, original, float(fast), float(slow))
        log = 0.1 * math.log(factor)
        magnitude *= (1 + log) / (1 + float(m.number("rope.scaling.yarn_log_multiplier", 0.0)) * log)
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
    named = (_token_id(file, name) for name in ("eos", "eot", "eom"))
    ids = {i for i in named if i is not None}
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ends = set(TURN_ENDS)
        ids |= {i for i, text in enumerate(tokens) if text in ends}
    return tuple(sorted(ids))
