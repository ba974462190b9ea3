"""Hugging Face's rope settings (`rope_scaling`, `rope_parameters`) to a RopeConfig."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.network.config import RopeConfig

# kind → the fields that it must have, and those that it may have
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, {"original_max_position_embeddings"}),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        set(),
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate"},
    ),
    "proportional": (set(), {"factor"}),
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "attention_factor", "original_max_position_embeddings"},
    ),
}  # fmt: skip
NOTES = {"finetuned"}  # fields that say how the model was made and change nothing (Yarn's own checkpoints)


def rope_config(
    cfg: dict[str, Any], head_dim: int, long: bool = False, also: tuple[str, ...] = ()
) -> RopeConfig:
    """The rope of a model's config.json; long: with longrope's factors for a context beyond the original one.
    also: fields that a scaling may have besides.

    Raises UnsupportedModelError for a scaling, or a field of one, that is not understood.
    """
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    params = dict(cfg.get("rope_parameters") or cfg.get("rope_scaling") or {})
    params = dict(params.get("full_attention") or params)  # one rope for each type of layer: the global one
    theta = float(params.pop("rope_theta", None) or cfg.get("rope_theta") or 10000.0)
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    partial = float(params.pop("partial_rotary_factor", None) or cfg.get("partial_rotary_factor") or 1.0)
    kind = "longrope" if kind == "su" else kind  # its name before it was published
    if kind not in FIELDS:
        raise UnsupportedModelError(
            f"The rope scaling {kind!r} is not supported.", f"Supported: {', '.join(sorted(FIELDS))}."
        )
    nothing_said = kind == "yarn" and "factor" not in params  # null stands for the ratio of the contexts
    params = {name: value for name, value in params.items() if value is not None and name not in NOTES}
    needed, allowed = FIELDS[kind]
    allowed = allowed | set(also)
    if kind != "default" and (nothing_said or not needed <= set(params) <= needed | allowed):
        raise UnsupportedModelError(
            f"The rope scaling {kind!r} has the fields {sorted(params)}, expected {sorted(needed)}"
            f"{' and maybe ' + ', '.join(sorted(allowed)) if allowed else ''}.",
            "A scaling that is only half understood gives garbage, so it is refused.",
        )
    original = cfg.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = int(original or cfg.get("max_position_embeddings", 2048))
    if kind == "proportional":
        factor, turned = float(params.get("factor", 1.0)), int(partial * head_dim // 2)
        return RopeConfig(theta, head_dim, kind, factor, turned=turned)
    base = RopeConfig(theta=theta, dim=int(head_dim * partial))
    if long:
        params["short_factor"] = params["long_factor"]
    return _MAKE[kind](base, params, original, cfg)


def _default(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    return base


def _linear(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    return RopeConfig(base.theta, base.dim, "linear", factor=float(params["factor"]))


def _dynamic(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    if alpha := params.get("alpha"):  # Hunyuan's: another base, whatever the length
        return RopeConfig(base.theta * float(alpha) ** (base.dim / (base.dim - 2)), base.dim)
    # Up to the trained context, where ours ends, it changes nothing (`_compute_dynamic_ntk_parameters`).
    return RopeConfig(base.theta, base.dim, "dynamic", factor=float(params["factor"]))


def _llama3(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    return RopeConfig(
        base.theta,
        base.dim,
        "llama3",
        factor=float(params["factor"]),
        low_freq_factor=float(params["low_freq_factor"]),
        high_freq_factor=float(params["high_freq_factor"]),
        original_context=original,
    )


def _yarn(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    factor = float(params.get("factor") or cfg["max_position_embeddings"] / original)
    magnitude = params.get("attention_factor")
    if magnitude is None:
        one, all_dims = params.get("mscale"), params.get("mscale_all_dim")
        magnitude = _mscale(factor)
        if one and all_dims:
            magnitude = _mscale(factor, float(one)) / _mscale(factor, float(all_dims))
    betas = float(params.get("beta_fast") or 32), float(params.get("beta_slow") or 1)
    factors = yarn_factors(base.theta, base.dim, factor, original, *betas, bool(params.get("truncate", True)))
    return RopeConfig(
        base.theta,
        base.dim,
        "yarn",
        factor,
        original_context=original,
        factors=factors,
        magnitude=float(magnitude),
    )


def score_magnitude(cfg: dict[str, Any], rope: RopeConfig) -> float:
    """What scores of attention are multiplied by besides, in families of latent attention: with YaRN, by the
    square of what `mscale_all_dim` says.
    """
    params = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
    all_dims = float(params.get("mscale_all_dim") or 0.0)
    return _mscale(rope.factor, all_dims) ** 2 if rope.kind == "yarn" and all_dims else 1.0


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_factors(
    theta: float,
    dim: int,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """Divisors of the frequencies: 1 where it turns often within the trained context, `factor` where it
    hardly turns, in between a ramp (Peng et al., YaRN, 2023, section 3.2).
    """

    if not 2 <= dim <= 1024:
        raise ValueError(f"{dim} rotated dimensions")

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return tuple((1 / (ramp / factor + (1 - ramp))).tolist())


def _longrope(base: RopeConfig, params: dict, original: int, cfg: dict) -> RopeConfig:
    factor = float(params.get("factor") or cfg["max_position_embeddings"] / original)
    magnitude = params.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = tuple(float(f) for f in params["short_factor"])
    return RopeConfig(
        base.theta,
        base.dim,
        "longrope",
        factor,
        original_context=original,
        factors=factors,
        magnitude=float(magnitude),
    )


_MAKE = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
