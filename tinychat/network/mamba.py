"""The state-space layer of a block (Dao & Gu, Transformers are SSMs, 2024): what files say of it, what its
tensors are called, and its half of the forward pass. Blocks of several families have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.network.family import Kept, Metadata, Settings, WeightSource
from tinychat.network.ops import Handle, MambaWeights, Ops
from tinychat.network.recurrence import MambaConfig

TYPES = ("linear_attention", "mamba")  # as config.json names it, now and before
DEFAULTS: Settings = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "time_step_limit": (0.0, math.inf),
}
# Vectors that are no norms, by their ends, and how they are called in folders.
KEPT = {
    ".conv1d": Kept(write=lambda a: a[:, None]),
    ".conv1d_bias": Kept(part=".bias", module="conv1d"),
    ".dt_bias": Kept(part=""),
    ".A_log": Kept(lambda a: -np.exp(a), lambda a: np.log(-a), part=""),
    ".D": Kept(part=""),
}
OWN_NAMES = (
    (r"\.conv1d\.bias$", ".conv1d_bias.weight"),
    (r"\.(A_log|D|dt_bias)$", r".\1.weight"),
)
GGUF_NAMES = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "conv1d_bias": "ssm_conv1d_bias",
    "dt_bias": "ssm_dt",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
}
GGUF_OWN = (
    (r"\.ssm_conv1d\.bias$", ".ssm_conv1d_bias.weight"),
    (r"\.ssm_dt\.bias$", ".ssm_dt.weight"),
    (r"\.ssm_(a|d)$", r".ssm_\1.weight"),
)


@dataclass(frozen=True)
class Mamba:
    """Weights of a state-space layer, as the backend's handles."""

    into: Handle
    vectors: MambaWeights
    out: Handle


def limits(c: Settings) -> tuple[float, float]:
    """How long a step may be. Files of transformers 5 write infinity as an object of its own."""
    limit = c["time_step_limit"]
    least, most = (0.0, math.inf) if limit is None else limit
    return _number(least), _number(most)


def _number(x: Any) -> float:
    return float(x["__float__"] if isinstance(x, dict) else x)


def from_hf(c: Settings, values: int) -> MambaConfig:
    """The layer of a config.json that says it in fields named `mamba_`; values: of a token."""
    heads, dim = c["mamba_n_heads"], c["mamba_d_head"]
    dim = values // heads if dim == "auto" else dim
    if heads * dim != values:
        raise ValueError(f"it has {heads} heads of {dim} for {values} values")
    least, most = limits(c)
    return MambaConfig(
        heads,
        dim,
        c["mamba_d_state"],
        c["mamba_n_groups"],
        c["mamba_d_conv"],
        biased=bool(c["mamba_conv_bias"]),
        least=least,
        most=most,
    )


def from_gguf(m: Metadata, layer: int) -> MambaConfig:
    """The layer of a GGUF, of which `layer` is one that has it."""
    heads, values = m.number("ssm.time_step_rank"), m.number("ssm.inner_size")
    dim = values // heads
    if heads * dim != values:
        raise ValueError(f"it has {heads} heads for {values} values")
    blk = f"blk.{layer}.ssm_"
    return MambaConfig(
        heads,
        dim,
        m.number("ssm.state_size"),
        m.number("ssm.group_count", 1),
        m.number("ssm.conv_kernel"),
        biased=bool(m.shape(blk + "conv1d.bias")),
        normed=bool(m.shape(blk + "norm.weight")),
    )


def load(w: WeightSource, p: str, m: MambaConfig) -> Mamba:
    """The layer whose modules' names begin with `p`."""
    into = w.linear(p + "in_proj")
    vectors = MambaWeights(
        conv=w.vector(p + "conv1d"),
        bias=w.vector(p + "conv1d_bias") if m.biased else None,
        decay=w.vector(p + "A_log"),
        dt=w.vector(p + "dt_bias"),
        skip=w.vector(p + "D"),
        norm=w.vector(p + "norm") if m.normed else None,
    )
    return Mamba(into, vectors, w.linear(p + "out_proj"))


def linears(p: str, hidden: int, m: MambaConfig) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of the layer's linears."""
    return {p + "in_proj": (m.projected, hidden), p + "out_proj": (hidden, m.values)}


def vectors(p: str, m: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what else the layer has."""
    shapes: dict[str, tuple[int, ...]] = {p + "conv1d": (m.channels, m.width)}
    shapes |= {p + "conv1d_bias": (m.channels,)} if m.biased else {}
    shapes |= {p + name: (m.n_heads,) for name in ("A_log", "dt_bias", "D")}
    return shapes | ({p + "norm": (m.values,)} if m.normed else {})


def mixed(ops: Ops, m: MambaConfig, w: Mamba, n: Handle, layer: int, eps: float, add_to: Handle) -> Handle:
    """The layer of n, [T, hidden], normed, added to the residual."""
    y = ops.mamba(ops.linear(n, w.into), w.vectors, m, layer, eps)
    return ops.linear(y, w.out, add_to=add_to)


def settings(m: MambaConfig) -> Settings:
    """Entries of config.json about the layer, in fields named `mamba_`."""
    limited = (m.least, m.most) != DEFAULTS["time_step_limit"]  # JSON has no word for infinity
    return {
        **({"time_step_limit": [m.least, m.most]} if limited else {}),
        "mamba_n_heads": m.n_heads,
        "mamba_d_head": m.head_dim,
        "mamba_d_state": m.state,
        "mamba_n_groups": m.groups,
        "mamba_d_conv": m.width,
        "mamba_conv_bias": m.biased,
    }
