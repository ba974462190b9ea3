"""Metadata of a GGUF that is written: carried over from another GGUF, or said of a Hugging Face checkpoint.

What is said of a folder is read back and compared with what the folder says (here, and the ids of a text in
`gguf_vocabulary`), so a setting that GGUF has no word for is refused and never lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf_config import FURTHER, TOP, read_config
from tinychat.formats.gguf_file import F32, Tensor
from tinychat.models import FAMILIES
from tinychat.network.config import AttentionConfig, ExpertsConfig, ModelConfig, RopeConfig
from tinychat.network.family import FromGGUF

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+\.)")
DROPPED = ("general.file_type", "general.quantization_version", "general.alignment", "GGUF.", "split.")


class Field(NamedTuple):
    """A value with the types that GGUF stores it in; `item` is that of a list."""

    value: Any
    type: Any
    item: Any = None


Fields = dict[str, Field]


def carried(path: Path) -> Fields:
    """The fields of a GGUF that has been read and checked, but those that say how it is quantized."""
    from gguf import GGUFReader

    fields = {
        key: Field(f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
        for key, f in GGUFReader(path).fields.items()
        if not key.startswith(DROPPED)
    }
    arch = fields["general.architecture"].value
    if further := fields.pop(f"{arch}.{FURTHER}", None):  # these layers are not written
        count = fields[f"{arch}.block_count"]
        fields[f"{arch}.block_count"] = count._replace(value=count.value - further.value)
    return fields


def architecture(cfg: ModelConfig) -> tuple[str, FromGGUF]:
    """The `general.architecture` of a family, and how it reads. Raises UnsupportedModelError without one."""
    forms = list(FAMILIES[cfg.family].GGUF.items())
    if not forms:
        raise UnsupportedModelError(f"GGUF has no name for a {cfg.family} model.", "Use another --format.")
    return forms[0]


def said(cfg: ModelConfig, name: str) -> tuple[Fields, dict[str, np.ndarray]]:
    """Fields and rope tensors of a model that came as a folder.

    Raises UnsupportedModelError where they say another network than the folder does.
    """
    from gguf import GGUFValueType as T

    arch, form = architecture(cfg)
    mixer, rope = cfg.attentions[0], cfg.rope or RopeConfig(dim=cfg.attentions[0].head_dim)
    mlp = cfg.layers[0].mlp
    whole = {
        "block_count": cfg.n_layers,
        "context_length": cfg.long_context or cfg.context_length,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": mlp.size,
        "attention.head_count": mixer.n_heads,
        "attention.head_count_kv": mixer.n_kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "rope.dimension_count": rope.dim,
        "vocab_size": cfg.vocab_size,
    }
    if window := max(a.window for a in cfg.attentions):
        whole["attention.sliding_window"] = window
    if isinstance(mlp, ExpertsConfig):
        whole |= {
            "expert_count": mlp.n,
            "expert_used_count": mlp.taken,
            "expert_feed_forward_length": mlp.size,
        }
        whole |= {"expert_shared_feed_forward_length": mlp.shared} if mlp.shared else {}
    real = {"attention.layer_norm_rms_epsilon": cfg.norm_eps, "rope.freq_base": rope.theta}
    known = {
        "attn_logit_softcapping": mixer.soft_cap,
        "final_logit_softcapping": cfg.logit_soft_cap,
        "attention.scale": mixer.scale or 0.0,
        "embedding_scale": cfg.embed_scale,
        "residual_scale": cfg.residual_scale,
        "logit_scale": 1 / cfg.logit_scale,
    }
    real |= {key: value for key, value in known.items() if key in form.options}
    scaling, tensors = _rope(cfg, rope)
    slides = [a.window > 0 for a in cfg.attentions]
    fields = {"general.architecture": Field(arch, T.STRING), "general.name": Field(name, T.STRING)}
    fields |= {f"{arch}.{key}": Field(int(v), T.UINT32) for key, v in whole.items()}
    fields |= {f"{arch}.{key}": Field(float(v), T.FLOAT32) for key, v in real.items()}
    kinds = {str: T.STRING, int: T.UINT32, float: T.FLOAT32}
    fields |= {f"{arch}.rope.scaling.{key}": Field(v, kinds[type(v)]) for key, v in scaling.items()}
    if "attention.sliding_window_pattern" in form.options and any(slides):
        fields[f"{arch}.attention.sliding_window_pattern"] = Field(slides, T.ARRAY, T.BOOL)
    draft: Any = _Draft(cfg, form, {key: f.value for key, f in fields.items()}, tensors)
    _check_config(cfg, read_config(draft)[1])
    return fields, tensors


class _Draft:
    """A file that is not written yet, as far as the reader of its config asks."""

    def __init__(
        self, cfg: ModelConfig, form: FromGGUF, fields: dict[str, Any], ropes: dict[str, np.ndarray]
    ):
        self.path, self.fields, self.ropes = Path("the GGUF"), fields, ropes
        table, family = (cfg.vocab_size, cfg.hidden_size), FAMILIES[cfg.family]
        shapes: dict[str, tuple[int, ...]] = {name: a.shape for name, a in ropes.items()}
        shapes["token_embd.weight"] = table
        if not cfg.tie_embeddings:
            shapes["output.weight"] = table
        for name, shape in family.linears(cfg, 0).items():
            if (heap := of_experts(name)) is not None:
                shapes[tensor_name(form, heap[0]) + ".weight"] = (cfg.n_experts, *shape)
                continue
            shapes[tensor_name(form, name) + ".weight"] = shape
            if name.endswith(family.biases(cfg)):
                shapes[tensor_name(form, name) + ".bias"] = shape[:1]
        self.tensors = {name: Tensor(name, shape, F32, 0, 0) for name, shape in shapes.items()}

    def floats(self, tensor: Tensor) -> np.ndarray:
        return self.ropes[tensor.name]

    def damaged(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"GGUF cannot say this network: {what}.", "Use another --format.")


def _rope(cfg: ModelConfig, rope: RopeConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Entries of `rope.scaling`, and the tensors of factors."""
    if rope.kind in ("linear", "yarn"):
        scaling = {"type": rope.kind, "factor": float(rope.factor)}
        if rope.kind == "yarn":
            scaling["original_context_length"] = int(rope.original_context)
        return scaling, {}
    if rope.kind == "longrope":
        scaling = {
            "original_context_length": int(rope.original_context),
            "attn_factor": float(rope.magnitude),
        }
        long = cfg.long_rope or rope
        factors = {"rope_factors_short.weight": rope.factors, "rope_factors_long.weight": long.factors}
        return scaling, {key: np.array(v, np.float32) for key, v in factors.items()}
    if rope.kind in ("llama3", "factors"):
        factors = replace(rope, kind="none").frequencies() / rope.frequencies()
        return {}, {"rope_freqs.weight": factors.astype(np.float32)}
    return {}, {}


def _check_config(want: ModelConfig, got: ModelConfig) -> None:
    """Raises UnsupportedModelError where a GGUF's metadata say another network than the folder did."""
    for what, (a, b) in {k: (v, _facts(got)[k]) for k, v in _facts(want).items()}.items():
        if not _alike(a, b):
            raise UnsupportedModelError(
                f"GGUF cannot say this model's {what}: {a} would be read as {b}.", "Use another --format."
            )


def _facts(cfg: ModelConfig) -> dict[str, Any]:
    """Numbers that decide what a network computes."""
    facts = {
        name: getattr(cfg, name)
        for name in ("hidden_size", "vocab_size", "n_layers", "norm_eps", "tie_embeddings", "embed_scale")
    }
    facts |= {name: getattr(cfg, name) for name in ("residual_scale", "logit_scale", "logit_soft_cap")}
    for i, layer in enumerate(cfg.layers):
        where, a, mlp = f"layer {i}", layer.mixer, layer.mlp
        facts[f"{where} experts"] = astuple(mlp) if isinstance(mlp, ExpertsConfig) else ()
        if not isinstance(a, AttentionConfig):
            facts[f"{where} recurrence"] = astuple(a) if a is not None else ()
            continue
        heads = (a.n_heads, a.n_kv_heads, a.head_dim)
        facts[f"{where} heads"] = heads
        facts[f"{where} window"] = a.window
        facts[f"{where} scale"] = a.scale or a.head_dim**-0.5
        facts[f"{where} soft cap"] = a.soft_cap
        rope = a.rope
        facts[f"{where} rope"] = (
            () if rope is None else (*rope.frequencies(), rope.magnitude, rope.kind == "dynamic")
        )
    return facts


def _alike(a: Any, b: Any) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=0)


def of_experts(name: str) -> tuple[str, int] | None:
    """Name of the heap that has a module of all experts, and which of these the module `name` is of:
    `….mlp.experts.3.up_proj` is the fourth in `….mlp.experts.up_proj`. None: it is no expert's.
    """
    match = _EXPERT.search(name)
    return match and (name[: match.start(1)] + name[match.end(1) :], int(match[1][:-1]))


def tensor_name(form: FromGGUF, name: str) -> str:
    """`model.layers.3.mlp.up_proj` → `blk.3.ffn_up`."""
    if name in TOP:
        return form.names.get(name, TOP[name])
    layer, _, module = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{form.names[module]}"


def is_carried(checkpoint: Any) -> bool:
    """Whether a checkpoint is a GGUF, whose metadata are carried over."""
    return isinstance(getattr(checkpoint, "fields", None), Mapping)
