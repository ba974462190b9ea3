"""What a network is, in numbers: read from a checkpoint by the formats, used by the models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tinychat.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, rotated dimensions and, for Llama 3.x or linear scaling, how frequencies
    change.

    kind "none" | "linear" | "llama3" | "factors". "llama3" follows Llama 3.1's frequency rescaling; "factors"
    divides each frequency by a stored number (GGUF's `rope_freqs.weight`, which is llama3 written out).
    """

    theta: float = 10000.0
    dim: int = 64
    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()

    def frequencies(self) -> np.ndarray:
        """float64 [dim / 2] radians a position."""
        inv = self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if self.kind == "linear":
            return inv / self.factor
        if self.kind == "factors":
            return inv / np.asarray(self.factors, dtype=np.float64)
        if self.kind == "llama3":
            wavelength = 2 * math.pi / inv
            smooth = np.divide(
                self.original_context / wavelength - self.low_freq_factor,
                self.high_freq_factor - self.low_freq_factor,
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            return (1 - smooth) * inv / self.factor + smooth * inv
        return inv


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model. Names follow Hugging Face's config.json where it has them."""

    family: str
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        limits = {
            "hidden_size": 1 << 17,
            "intermediate_size": 1 << 19,
            "n_layers": 1024,
            "n_heads": 1024,
            "n_kv_heads": 1024,
            "head_dim": 1024,
            "vocab_size": 1 << 22,
            "context_length": 1 << 25,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise CheckpointError(
                    f"The checkpoint's {name} is {value!r}, outside 1…{limit}.",
                    "The file is damaged or not a language model; pull it again.",
                )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"The checkpoint has {self.n_heads} heads for {self.n_kv_heads} KV heads.",
                "The file is damaged; pull it again.",
            )
        if not (0 < self.norm_eps < 1) or not math.isfinite(self.rope.theta) or self.rope.theta <= 0:
            raise CheckpointError(
                f"The checkpoint has norm epsilon {self.norm_eps!r} and rope theta {self.rope.theta!r}.",
                "The file is damaged; pull it again.",
            )
        if self.rope.dim % 2 or not 0 < self.rope.dim <= self.head_dim:
            raise CheckpointError(
                f"The checkpoint rotates {self.rope.dim} of {self.head_dim} head dimensions.",
                "The file is damaged; pull it again.",
            )
        try:
            with np.errstate(all="ignore"):
                frequencies = self.rope.frequencies()
        except ValueError:  # stored factors of another number
            frequencies = np.zeros(1)
        if not (np.isfinite(frequencies) & (frequencies > 0)).all():
            raise CheckpointError(
                f"The checkpoint's rope scaling {self.rope.kind!r} gives frequencies that are not positive.",
                "The file is damaged; pull it again.",
            )
        for token_id in (self.bos_id, *self.eos_ids):
            if token_id is not None and (not isinstance(token_id, int) or isinstance(token_id, bool)):
                raise CheckpointError(
                    f"The checkpoint's token id {token_id!r} is not a number.",
                    "The file is damaged; pull it again.",
                )

    @classmethod
    def from_hf(cls, cfg: dict, generation: dict | None = None) -> ModelConfig:
        """From config.json (and generation_config.json, whose stop tokens win).

        Raises UnsupportedModelError for an architecture or rope scaling that is not understood, by name.
        """
        named = cfg.get("architectures") or "(none)"
        arch = str(named[0] if isinstance(named, list) else named)
        if arch not in HF_FAMILIES:
            raise UnsupportedModelError(
                f"The architecture {arch} is not supported.", f"Supported: {', '.join(sorted(HF_FAMILIES))}."
            )
        act = cfg.get("hidden_act", "silu")
        if act != "silu":
            raise UnsupportedModelError(
                f"The activation {act!r} is not supported in a {arch}.", "Supported: silu."
            )
        try:
            hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
            head_dim = cfg.get("head_dim") or hidden // heads
            eos = (generation or {}).get("eos_token_id")
            eos = cfg.get("eos_token_id") if eos is None else eos
            return cls(
                family=HF_FAMILIES[arch],
                hidden_size=hidden,
                intermediate_size=cfg["intermediate_size"],
                n_layers=cfg["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=cfg.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                vocab_size=cfg["vocab_size"],
                context_length=_hf_context(cfg),
                norm_eps=float(cfg.get("rms_norm_eps", 1e-6)),
                rope=_hf_rope(cfg, head_dim),
                tie_embeddings=bool(cfg.get("tie_word_embeddings", False)),
                attention_bias=bool(cfg.get("attention_bias", False)),
                mlp_bias=bool(cfg.get("mlp_bias", False)),
                bos_id=cfg.get("bos_token_id"),
                eos_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise CheckpointError(
                f"config.json does not describe a {arch}: {type(e).__name__} {e}.",
                "The folder is damaged or incomplete; pull it again.",
            ) from e


HF_FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}


def _hf_context(cfg: dict) -> int:
    context = cfg.get("max_position_embeddings", 2048)
    window = cfg.get("sliding_window")
    return min(context, window) if window else context


def _hf_rope(cfg: dict, head_dim: int) -> RopeConfig:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    params = dict(cfg.get("rope_parameters") or cfg.get("rope_scaling") or {})
    theta = float(params.pop("rope_theta", None) or cfg.get("rope_theta") or 10000.0)
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    partial = float(params.pop("partial_rotary_factor", None) or cfg.get("partial_rotary_factor") or 1.0)
    base = dict(theta=theta, dim=int(head_dim * partial))
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in known:
        raise UnsupportedModelError(
            f"The rope scaling {kind!r} is not supported.", f"Supported: {', '.join(sorted(known))}."
        )
    needed = known[kind]
    if kind != "default" and set(params) != needed:
        raise UnsupportedModelError(
            f"The rope scaling {kind!r} has the fields {sorted(params)}, expected {sorted(needed)}.",
            "A scaling that is only half understood gives garbage, so it is refused.",
        )
    if kind == "default":
        return RopeConfig(**base)
    if kind == "linear":
        return RopeConfig(kind="linear", factor=float(params["factor"]), **base)
    return RopeConfig(
        kind="llama3",
        factor=float(params["factor"]),
        low_freq_factor=float(params["low_freq_factor"]),
        high_freq_factor=float(params["high_freq_factor"]),
        original_context=int(params["original_max_position_embeddings"]),
        **base,
    )
