"""config.json of every family to a ModelConfig; what is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tinychat.config import ModelConfig
from tinychat.errors import CheckpointError, UnsupportedModelError
from tinychat.rope_scaling import rope_config


@dataclass(frozen=True)
class Architecture:
    """How one architecture's config.json reads.

    defaults  what transformers' config class takes where the file is silent
    options   settings of OPTIONS that this architecture has; `extra` reads them
    """

    family: str
    defaults: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda cfg: {}


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


def _granite(cfg: dict[str, Any]) -> dict[str, Any]:
    return {
        "embed_scale": float(cfg["embedding_multiplier"]),
        "residual_scale": float(cfg["residual_multiplier"]),
        "attn_scale": float(cfg["attention_multiplier"]),
        "logit_scale": 1 / float(cfg["logits_scaling"]),
    }


def _smollm3(cfg: dict[str, Any]) -> dict[str, Any]:
    rotated = cfg.get("no_rope_layers")  # 1 where a layer has rope, in spite of its name
    if rotated is None:
        interval = cfg["no_rope_layer_interval"]
        rotated = [(i + 1) % interval for i in range(min(cfg["num_hidden_layers"], 1024))]
    if len(rotated) < cfg["num_hidden_layers"]:
        raise ValueError(f"no_rope_layers names {len(rotated)} layers")
    return {"unrotated_layers": tuple(i for i, on in enumerate(rotated) if not on)}


_GRANITE = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("llama"),
    "MinistralForCausalLM": Architecture("llama"),
    "Qwen2ForCausalLM": Architecture("qwen2", {"use_sliding_window": False, "attention_bias": True}),
    "Qwen3ForCausalLM": Architecture("qwen3", {"use_sliding_window": False, "head_dim": 128}),
    "Phi3ForCausalLM": Architecture("phi3", {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        {
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        ("no_rope_layers",),
        _smollm3,
    ),
    "Olmo2ForCausalLM": Architecture("olmo2", {"rms_norm_eps": 1e-5}),
    "GraniteForCausalLM": Architecture("granite", dict.fromkeys(_GRANITE, 1.0), _GRANITE, _granite),
}


def read(given: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
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
        return ModelConfig(
            family=kind.family,
            hidden_size=hidden,
            intermediate_size=cfg["intermediate_size"],
            n_layers=cfg["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=cfg.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=cfg["vocab_size"],
            context_length=_context(cfg),
            norm_eps=float(cfg.get("rms_norm_eps", 1e-6)),
            rope=rope_config(cfg, head_dim),
            tie_embeddings=bool(cfg.get("tie_word_embeddings", False)),
            attention_bias=bool(cfg.get("attention_bias", False)),
            mlp_bias=bool(cfg.get("mlp_bias", False)),
            bos_id=cfg.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            **kind.extra(cfg),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(
            f"config.json does not describe a {arch}: {type(e).__name__} {e}.",
            "The folder is damaged or incomplete; pull it again.",
        ) from e


def _refuse(arch: str, kind: Architecture, cfg: dict[str, Any]) -> None:
    act = cfg.get("hidden_act", "silu")
    if act != "silu":
        raise UnsupportedModelError(
            f"The activation {act!r} is not supported in a {arch}.", "Supported: silu."
        )
    types = cfg.get("layer_types") or []
    for layer_type in types if isinstance(types, list) else [types]:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"Layers of the type {layer_type!r} are not supported in a {arch}.",
                "Supported: full_attention, sliding_attention.",
            )
    for option, harmless in OPTIONS.items():
        if option not in kind.options and cfg.get(option) not in harmless:
            raise UnsupportedModelError(
                f"The option {option} = {cfg[option]!r} is not supported in a {arch}.",
                "A setting that is ignored gives garbage, so it is refused.",
            )


def _context(cfg: dict[str, Any]) -> int:
    # Within its window sliding attention is full attention, so nothing is computed differently.
    context = cfg.get("max_position_embeddings", 2048)
    window = cfg.get("sliding_window") if cfg.get("use_sliding_window", True) else None
    rope = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        context = min(context, cfg.get("original_max_position_embeddings") or context)
    return min(context, window) if window else context
