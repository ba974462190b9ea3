"""Experts of a folder by the names of transformers' modules, one linear each, whatever the file calls them.

Mixtral's files say `block_sparse_moe.experts.3.w1` for `mlp.experts.3.gate_proj`. What transformers 5 saves
with `save_original_format=False` has all experts in one tensor, `mlp.experts.gate_up_proj` [experts,
2 · size, hidden].
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from tinychat.formats.tensors import Tensor
from tinychat.network.config import ModelConfig

_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.(\w+)")
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")


def by_module(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The tensors with every expert's under its own module's name; a model without experts stays as it is."""
    if not cfg.n_experts:
        return tensors
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, expert, linear, part = match.groups()
            module = f"experts.{expert}.{_MIXTRAL[linear]}" if linear else "gate"
            out[f"{layer}mlp.{module}.{part}"] = t
        elif (match := _FUSED.fullmatch(name)) and len(t.shape) == 3 and t.shape[0] == cfg.n_experts:
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


def _rows(t: Tensor, expert: int, start: int, end: int):
    def read() -> np.ndarray:
        return t.read()[expert, start:end]

    return read
