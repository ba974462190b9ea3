"""config.json of every family to a ModelConfig; what is not understood is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.network.config import LAYERS, ModelConfig, decoder_layers
from tinychat.network.hf_rope import rope_config

Settings = dict[str, Any]


def _no_layers(cfg: Settings) -> list[int]:
    return []


@dataclass(frozen=True)
class Architecture:
    """How one architecture's config.json reads.

    defaults    what transformers' config class takes where the file is silent
    options     settings of OPTIONS that this architecture has; `extra` reads them
    windowed    layers that a sliding window is for, where the file has no layer_types
    activation  the setting that names it, and what it must be
    """

    family: str
    defaults: Settings = field(default_factory=dict)
    options: tuple[str, ...] = ()
    extra: Callable[[Settings], Settings] = lambda cfg: {}
    windowed: Callable[[Settings], Iterable[int]] = _no_layers
    activation: tuple[str, str] = ("hidden_act", "silu")


# Settings that change what a network computes, and the values that do not.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "alibi": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": (None, False),
    "qk_layernorm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
}


def _layers(cfg: Settings) -> range:
    return range(min(cfg["num_hidden_layers"], 1024))


def _last_layers(cfg: Settings) -> Iterable[int]:
    return (i for i in _layers(cfg) if i >= cfg["max_window_layers"])


def _granite(cfg: Settings) -> Settings:
    return {
        "embed_scale": float(cfg["embedding_multiplier"]),
        "residual_scale": float(cfg["residual_multiplier"]),
        "attn_scale": float(cfg["attention_multiplier"]),
        "logit_scale": 1 / float(cfg["logits_scaling"]),
    }


def _unrotated(cfg: Settings) -> tuple[int, ...]:
    rotated = cfg.get("no_rope_layers")  # 1 where a layer has rope, in spite of its name
    if rotated is None:
        return tuple(i for i in _layers(cfg) if (i + 1) % cfg["no_rope_layer_interval"] == 0)
    if len(rotated) < cfg["num_hidden_layers"]:
        raise ValueError(f"no_rope_layers names {len(rotated)} layers")
    return tuple(i for i in _layers(cfg) if not rotated[i])


def _gemma2(cfg: Settings) -> Settings:
    return {
        "embed_scale": math.sqrt(cfg["hidden_size"]),
        "attn_scale": float(cfg["query_pre_attn_scalar"]) ** -0.5,
        "attn_soft_cap": float(cfg.get("attn_logit_softcapping") or 0),
        "logit_soft_cap": float(cfg.get("final_logit_softcapping") or 0),
    }


def _gemma3(cfg: Settings) -> Settings:
    given = cfg.get("rope_parameters") or {}
    local = given.get("sliding_attention") or {"rope_theta": cfg["rope_local_base_freq"]}
    return _gemma2(cfg) | {"local_rope": rope_config({**cfg, "rope_parameters": local}, cfg["head_dim"])}


def _gemma3_layers(cfg: Settings) -> Iterable[int]:
    # the published files spell it with and without the underscore
    every = cfg.get("sliding_window_pattern") or cfg["_sliding_window_pattern"]
    return (i for i in _layers(cfg) if (i + 1) % every)


def _mixtral(cfg: Settings) -> Settings:
    return _experts(cfg, cfg["intermediate_size"], 8)


def _qwen3_moe(cfg: Settings) -> Settings:
    step, dense = cfg["decoder_sparse_step"], cfg["mlp_only_layers"] or ()
    return _experts(cfg, cfg["moe_intermediate_size"], 128) | {
        "norm_experts": bool(cfg["norm_topk_prob"]),
        "dense_layers": tuple(i for i in _layers(cfg) if i in dense or (i + 1) % step),
    }


def _experts(cfg: Settings, size: int, default: int) -> Settings:
    # transformers has two names for the number and writes either
    named = {cfg[name] for name in ("num_experts", "num_local_experts") if cfg.get(name) is not None}
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(map(str, sorted(named)))} experts")
    n = named.pop() if named else default
    return {"n_experts": n, "n_experts_used": cfg["num_experts_per_tok"], "expert_size": size}


_QWEN = {"use_sliding_window": False, "max_window_layers": 28}
_GRANITE = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")
_EXPERTS = ("num_experts", "num_local_experts")
_GELU = ("hidden_activation", "gelu_pytorch_tanh")
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 256, "head_dim": 256, "sliding_window": 4096}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("llama", {"sliding_window": 4096}, windowed=_layers),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
        _EXPERTS,
        _mixtral,
        _layers,
    ),
    "MinistralForCausalLM": Architecture("llama", {"sliding_window": 4096}, windowed=_layers),
    "Qwen2ForCausalLM": Architecture("qwen2", _QWEN, windowed=_last_layers),
    "Qwen3ForCausalLM": Architecture("qwen3", {**_QWEN, "head_dim": 128}, windowed=_last_layers),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        {
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        _EXPERTS,
        _qwen3_moe,
        lambda cfg: _layers(cfg) if cfg["use_sliding_window"] else (),
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3", {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}, windowed=_layers
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        {
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        ("no_rope_layers",),
        lambda cfg: {"unrotated_layers": _unrotated(cfg)},
        _unrotated,
    ),
    "Olmo2ForCausalLM": Architecture("olmo2", {"rms_norm_eps": 1e-5}),
    "GraniteForCausalLM": Architecture("granite", dict.fromkeys(_GRANITE, 1.0), _GRANITE, _granite),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        _gemma2,
        lambda cfg: _layers(cfg)[::2],
        _GELU,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        {**_GEMMA, "_sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ("query_pre_attn_scalar", "final_logit_softcapping"),
        _gemma3,
        _gemma3_layers,
        _GELU,
    ),
}


def read(given: Settings, generation: Settings | None = None) -> ModelConfig:
    """From config.json (and generation_config.json, whose stop tokens win).

    Raises UnsupportedModelError for an architecture, option or rope scaling that is not understood, by name,
    and CheckpointError where the file does not describe a model.
    """
    named = given.get("architectures") or "(none)"
    arch = str(named[0] if isinstance(named, list) else named)
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"The architecture {arch} is not supported.", f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    kind = ARCHITECTURES[arch]
    cfg = {**kind.defaults, **given}
    _refuse(arch, kind, cfg)
    try:
        hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
        head_dim = cfg.get("head_dim") or hidden // heads
        eos = (generation or {}).get("eos_token_id")
        eos = cfg.get("eos_token_id") if eos is None else eos
        flat = kind.extra(cfg)
        ropes = _ropes(cfg, head_dim)
        config = ModelConfig(
            family=kind.family,
            hidden_size=hidden,
            layers=decoder_layers(
                cfg["num_hidden_layers"],
                intermediate_size=cfg["intermediate_size"],
                n_heads=heads,
                n_kv_heads=cfg.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                rope=ropes.pop("rope"),
                **_windows(kind, cfg),
                **{name: flat.pop(name) for name in LAYERS if name in flat},
            ),
            vocab_size=cfg["vocab_size"],
            norm_eps=float(cfg.get("rms_norm_eps", 1e-6)),
            **ropes,
            tie_embeddings=bool(cfg.get("tie_word_embeddings", False)),
            attention_bias=bool(cfg.get("attention_bias", False)),
            mlp_bias=bool(cfg.get("mlp_bias", False)),
            bos_id=cfg.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            **flat,
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(
            f"config.json does not describe a {arch}: {type(e).__name__} {e}.",
            "The folder is damaged or incomplete; pull it again.",
        ) from e
    rope = config.rope
    if rope and rope.dim != config.head_dim and kind.family != "phi3":
        raise UnsupportedModelError(
            f"The option partial_rotary_factor is not supported in a {arch}.",
            "A setting that is ignored gives garbage, so it is refused.",
        )
    return config


def _refuse(arch: str, kind: Architecture, cfg: Settings) -> None:
    setting, needed = kind.activation
    act = cfg.get(setting, needed)
    if act != needed:
        raise UnsupportedModelError(
            f"The activation {act!r} is not supported in a {arch}.", f"Supported: {needed}."
        )
    types = cfg.get("layer_types") or []
    for layer_type in types if isinstance(types, list) else [types]:
        windows = ("sliding_attention",) if kind.windowed is not _no_layers else ()
        if layer_type not in ("full_attention", *windows):
            raise UnsupportedModelError(
                f"Layers of the type {layer_type!r} are not supported in a {arch}.",
                f"Supported: {', '.join(('full_attention', *windows))}.",
            )
    for option, harmless in OPTIONS.items():
        if option not in kind.options and cfg.get(option) not in harmless:
            raise UnsupportedModelError(
                f"The option {option} = {cfg[option]!r} is not supported in a {arch}.",
                "A setting that is ignored gives garbage, so it is refused.",
            )


def _context(cfg: Settings) -> int:
    return cfg.get("max_position_embeddings", 2048)


def _ropes(cfg: Settings, head_dim: int) -> Settings:
    """The rope and the context that it is for; a second pair where longrope has one."""
    rope, context = rope_config(cfg, head_dim), _context(cfg)
    if rope.kind != "longrope" or context <= rope.original_context:
        return {"rope": rope, "context_length": context}
    long = {"long_rope": rope_config(cfg, head_dim, long=True), "long_context": context}
    return {"rope": rope, "context_length": rope.original_context, **long}


def _windows(kind: Architecture, cfg: Settings) -> Settings:
    window = cfg.get("sliding_window") if cfg.get("use_sliding_window", True) else None
    types = cfg.get("layer_types")
    if types and kind.windowed is not _no_layers:
        if len(types) < cfg["num_hidden_layers"]:
            raise ValueError(f"layer_types names {len(types)} layers")
        layers = tuple(i for i in _layers(cfg) if types[i] == "sliding_attention")
    else:
        layers = tuple(kind.windowed(cfg)) if cfg.get("sliding_window") else ()
    if window and window >= _context(cfg):
        window = None  # nothing is ever outside; the layers may still have their own rope
    return {"window": window or None, "windowed_layers": layers}
