"""Experts of a folder by the names of transformers' modules, one linear each.

What transformers 5 saves with `save_original_format=False` has all experts in one tensor,
`mlp.experts.gate_up_proj` [experts, 2 · size, hidden].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tinychat.formats.tensors import Tensor
from tinychat.network.config import ExpertsConfig, ModelConfig

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")


def by_module(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The tensors with every expert's under its own module's name; a model without experts stays as it is."""
    counts = {layer.mlp.n for layer in cfg.layers if isinstance(layer.mlp, ExpertsConfig)}
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if (match := _FUSED.fullmatch(name)) and len(t.shape) == 3 and t.shape[0] in counts:
            out |= _apart(match[1], match[2], t)
        else:
            out[name] = t
    return out


def _apart(prefix: str, linear: str, t: Tensor) -> dict[str, Tensor]:
    experts, rows, columns = t.shape
    parts = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
    n = rows // len(parts)
    return {
        f"{prefix}{e}.{part}.weight": replace(t, shape=(n, columns), read=_rows(t, e, i * n, (i + 1) * n))
        for e in range(experts)
        for i, part in enumerate(parts)
    }


def _rows(t: Tensor, expert: int, start: int, end: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        return t.read()[expert, start:end]

    return read
