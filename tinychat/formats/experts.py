"""Experts of a folder by the names of transformers' modules, one linear each, where files stack a layer's.

transformers 5  mlp.experts.gate_up_proj [experts, 2 · size, hidden] and down_proj, if not saved in the
                original format; in FP8 with gate_up_proj_scale_inv [experts, blocks, blocks]
gpt-oss         mlp.experts.gate_up_proj_blocks and _scales: a row of gate and a row of up in turn; in 16 bits
                mlp.experts.gate_up_proj [experts, hidden, 2 · size], turned round, with _bias beside it
MLX             mlp.switch_mlp.gate_proj.weight, .scales, .biases
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tinychat.formats.tensors import Tensor
from tinychat.network.config import ExpertsConfig, ModelConfig

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|up_proj|down_proj)(_\w+)?")
_SWITCH = re.compile(
    r"(model\.layers\.\d+\.(?:mlp|block_sparse_moe)\.)switch_mlp\.(gate_proj|up_proj|down_proj)\.(\w+)"
)
# what follows the name of a stacked tensor → the part of an expert's module
_PARTS = {
    None: "weight",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_activation_scale": "activation_scale",
    "_input_scale": "input_scale",
    "_blocks": "blocks",
    "_scales": "scales",
    "_bias": "bias",
}
_IN_TURN = ("_blocks", "_scales", "_bias")  # gpt-oss alone has these


def by_module(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The tensors with every expert's under its own module's name; a model without experts stays as it is."""
    counts = {layer.mlp.n for layer in cfg.layers if isinstance(layer.mlp, ExpertsConfig)}
    if not counts:
        return tensors
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        stacked = bool(t.shape) and t.shape[0] in counts
        if stacked and (match := _FUSED.fullmatch(name)) and match[3] in _PARTS:
            turned = match[3] is None and len(t.shape) == 3 and f"{name}_bias" in tensors
            out |= _apart(match[1], match[2], match[3], _turned(t) if turned else t, turned) or {name: t}
        elif stacked and (match := _SWITCH.fullmatch(name)):
            prefix = match[1].replace("block_sparse_moe", "mlp")
            for e in range(t.shape[0]):
                out[f"{prefix}experts.{e}.{match[2]}.{match[3]}"] = replace(
                    t, shape=t.shape[1:], read=_rows(t, e, slice(None))
                )
        else:
            out[name] = t
    return out


def _turned(t: Tensor) -> Tensor:
    """A tensor [experts, in, out] as [experts, out, in]."""
    return replace(t, shape=(t.shape[0], *t.shape[:0:-1]), read=lambda: t.read().swapaxes(1, 2))


def _apart(
    prefix: str, linear: str, suffix: str | None, t: Tensor, in_turn: bool = False
) -> dict[str, Tensor]:
    """Each expert's own tensors; none where the rows of gate and up cannot be told apart.

    in_turn  a row of the one and a row of the other follow each other
    """
    in_turn = in_turn or suffix in _IN_TURN
    linears = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
    count, rows = len(linears), t.shape[1] if len(t.shape) > 1 else 1
    if count == 2 and rows > 1 and rows % 2:
        return {}
    out = {}
    for i, name in enumerate(linears):
        whole = count == 1 or rows == 1  # a scale of both
        half = slice(i, None, 2) if in_turn else slice(i * rows // 2, (i + 1) * rows // 2)
        of_expert = slice(None) if whole else half
        shape = t.shape[1:] if whole else (rows // 2, *t.shape[2:])
        for e in range(t.shape[0]):
            own = replace(t, shape=shape, read=_rows(t, e, of_expert))
            out[f"{prefix}{e}.{name}.{_PARTS[suffix]}"] = own
    return out


def _rows(t: Tensor, expert: int, rows: slice) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        own = t.read()[expert]
        return own[rows] if own.ndim else own

    return read
