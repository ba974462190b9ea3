"""config.json to a ModelConfig, as each family says; what is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.network.config import AttentionConfig, DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromHF, Settings, Stack
from tinychat.network.hf_rope import rope_config

# Settings that change what a network computes, and the values that do not.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "alibi": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "clip_qkv": (None,),
    "conv_bias": (None, False),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "moe_layer_freq": (None, 1),
    "n_group": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "n_shared_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "parallel_attn": (None, False),
    "qk_layernorm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "scoring_func": (None, "softmax"),
    "use_attention_gate": (None, True),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "use_sandwich_norm": (None, True),
}


def read(
    given: Settings, generation: Settings | None, architectures: Mapping[str, tuple[str, FromHF]]
) -> ModelConfig:
    """From config.json (and generation_config.json, whose stop tokens win).

    architectures  what is known: name → family and how it reads
    Raises UnsupportedModelError for an architecture, option or rope scaling that is not understood, by name,
    and CheckpointError where the file does not describe a model.
    """
    given = text_settings(given, architectures)
    arch = architecture(given)
    if arch not in architectures:
        wrappers = {name for _, form in architectures.values() for name in form.wrappers}
        raise UnsupportedModelError(
            f"The architecture {arch} is not supported.",
            f"Supported: {', '.join(sorted({*architectures, *wrappers}))}.",
        )
    family, form = architectures[arch]
    cfg = {**form.defaults, **given}
    if given.get("rope_scaling"):  # the older name of what a default may stand for
        cfg["rope_parameters"] = given.get("rope_parameters")
    try:
        cfg = form.said(cfg)
        _refuse(arch, form, cfg)
        config = _config(family, form, cfg, generation or {})
    except (LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(
            f"config.json does not describe a {arch}: {type(e).__name__} {e}.",
            "The folder is damaged or incomplete; pull it again.",
        ) from e
    parts = any(a.rope is not None and a.rope.dim != a.head_dim for a in config.attentions)
    if parts and not form.partial_rope:
        raise UnsupportedModelError(
            f"The option partial_rotary_factor is not supported in a {arch}.",
            "A setting that is ignored gives garbage, so it is refused.",
        )
    return config


def architecture(given: Settings) -> str:
    """Architecture that config.json names first."""
    named = given.get("architectures") or "(none)"
    return str(named[0] if isinstance(named, list) else named)


def text_settings(given: Settings, architectures: Mapping[str, tuple[str, FromHF]]) -> Settings:
    """Settings of the text model that a wrapper for several inputs holds; those of another model as they are.

    Raises UnsupportedModelError for a wrapper of a text model that is not known, by name.
    """
    outer, inner = architecture(given), given.get("text_config")
    wrapped = {form.model_type: arch for arch, (_, form) in architectures.items() if outer in form.wrappers}
    if not wrapped or not isinstance(inner, dict):
        return given
    name = str(inner.get("model_type", next(iter(wrapped))))
    if name not in wrapped:
        raise UnsupportedModelError(
            f"A {outer} with a text model of the type {name!r} is not supported.",
            f"Supported text models in it: {', '.join(wrapped)}.",
        )
    # what the text model does not say itself; two tensors that differ are never tied, whatever is said here
    shared = {key: given[key] for key in ("bos_token_id", "eos_token_id") if given.get(key) is not None}
    shared["tie_word_embeddings"] = given.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
    return {**inner, **shared, "architectures": [wrapped[name]], "model_type": name}


WRAPPED = (
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.language_model|language_model\.model)\.", "model."),
)
"""How wrappers call the modules of their text model, as `FromHF.tensors` has it."""


def _config(family: str, form: FromHF, cfg: Settings, generation: Settings) -> ModelConfig:
    hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
    head_dim = cfg.get(form.head_dim) or hidden // heads
    ropes = _ropes(cfg, head_dim, form.rope_fields)
    attention = AttentionConfig(
        heads,
        cfg.get("num_key_value_heads") or heads,
        head_dim,
        ropes.pop("rope"),
        _window(cfg) if form.windows else 0,
    )
    size = cfg["intermediate_size"]
    if form.varied and isinstance(size, list):
        size = size[0]
    stack = Stack(cfg["num_hidden_layers"], attention, DenseConfig(size))
    eos = generation.get("eos_token_id")
    eos = cfg.get("eos_token_id") if eos is None else eos
    fields: dict[str, Any] = dict(
        family=family,
        hidden_size=hidden,
        layers=form.layers(cfg, stack) if form.layers else windowed(cfg, stack),
        vocab_size=cfg["vocab_size"],
        norm_eps=float(cfg.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(cfg.get("tie_word_embeddings", False)),
        attention_bias=bool(cfg.get("attention_bias", False)),
        mlp_bias=bool(cfg.get("mlp_bias", False)),
        bos_id=cfg.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        **ropes,
    )
    return ModelConfig(**{**fields, **form.constants(cfg)})


def slides(cfg: Settings, otherwise: Callable[[int], bool] = lambda i: True) -> Callable[[int], bool]:
    """Whether layer i is one of those with the sliding window: as layer_types say, `otherwise` where the file
    has none.
    """
    types = cfg.get("layer_types")
    if not types:
        return otherwise if cfg.get("sliding_window") else lambda i: False
    if len(types) < cfg["num_hidden_layers"]:
        raise ValueError(f"layer_types names {len(types)} layers")
    return lambda i: types[i] == "sliding_attention"


def windowed(
    cfg: Settings, stack: Stack, otherwise: Callable[[int], bool] = lambda i: True
) -> tuple[LayerConfig, ...]:
    """Layers that differ in nothing but the window, which those have that `slides` says."""
    if not stack.attention.window:
        return stack.layers()
    whole, here = replace(stack.attention, window=0), slides(cfg, otherwise)
    return stack.layers(lambda i: stack.attention if here(i) else whole)


def experts(cfg: Settings, size: int, default: int, normalize: bool = True) -> ExpertsConfig:
    """The experts of a layer, each of the intermediate size `size`; `default` where no number is named."""
    # transformers has two names for the number and writes either
    named = {cfg[name] for name in EXPERTS if cfg.get(name) is not None}
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(map(str, sorted(named)))} experts")
    return ExpertsConfig(named.pop() if named else default, cfg["num_experts_per_tok"], size, normalize)


EXPERTS = ("num_experts", "num_local_experts")


def layer_types(cfg: ModelConfig) -> list[str]:
    """How config.json names which layers have a window."""
    return ["sliding_attention" if a.window else "full_attention" for a in cfg.attentions]


def windows_of(cfg: ModelConfig) -> Settings:
    """The settings of a family that says whether it uses its window."""
    return {"use_sliding_window": True, "layer_types": layer_types(cfg)} if cfg.windowed else UNUSED


UNUSED = {"use_sliding_window": False}


def _refuse(arch: str, form: FromHF, cfg: Settings) -> None:
    setting, needed = form.activation
    act = cfg.get(setting, needed)
    if act != needed:
        raise UnsupportedModelError(
            f"The activation {act!r} is not supported in a {arch}.", f"Supported: {needed}."
        )
    known = (*form.mixers, "full_attention", *(("sliding_attention",) if form.windows else ()))
    types = cfg.get("layer_types") or []
    for layer_type in types if isinstance(types, list) else [types]:
        if layer_type not in known:
            raise UnsupportedModelError(
                f"Layers of the type {layer_type!r} are not supported in a {arch}.",
                f"Supported: {', '.join(known)}.",
            )
    for option, harmless in OPTIONS.items():
        if option not in form.options and cfg.get(option) not in harmless:
            raise UnsupportedModelError(
                f"The option {option} = {cfg[option]!r} is not supported in a {arch}.",
                "A setting that is ignored gives garbage, so it is refused.",
            )


def _context(cfg: Settings) -> int:
    return cfg.get("max_position_embeddings", 2048)


def _ropes(cfg: Settings, head_dim: int, fields: tuple[str, ...]) -> dict[str, Any]:
    """The rope and the context that it is for; a second pair where longrope has one. fields: those of a
    scaling that the family has beside those of all.
    """
    rope, context = rope_config(cfg, head_dim, also=fields), _context(cfg)
    if rope.kind != "longrope" or context <= rope.original_context:
        return {"rope": rope, "context_length": context}
    long = {"long_rope": rope_config(cfg, head_dim, long=True), "long_context": context}
    return {"rope": rope, "context_length": rope.original_context, **long}


def _window(cfg: Settings) -> int:
    window = cfg.get("sliding_window") if cfg.get("use_sliding_window", True) else None
    if window and window >= _context(cfg):
        return 0  # nothing is ever outside; the layers may still have their own rope
    return window or 0
