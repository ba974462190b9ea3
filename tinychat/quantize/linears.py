"""Which linears of a block are quantized: all but those that stay as they are stored, which are routers,
gates of experts, and the heads' matrices of latent attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tinychat.models import FAMILIES
from tinychat.network.config import ExpertsConfig, ModelConfig
from tinychat.network.family import Part
from tinychat.quantize.nodes import Names, short

if TYPE_CHECKING:
    from tinychat.quantize.nodes import Routing

Shapes = dict[str, tuple[int, int]]


class _Choosing(Names):
    """Hears which linears choose."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def router(self, name: str) -> Routing:
        self.found.add(name)
        return super().router(name)


@lru_cache(maxsize=4)
def kept(cfg: ModelConfig) -> frozenset[str]:
    """Names of linears that stay as they are stored."""
    choosing = _Choosing()
    FAMILIES[cfg.family].load(choosing, cfg.without_further)
    layers = range(cfg.n_layers)
    return frozenset(choosing.found | {f"model.layers.{i}.{name}" for i in layers for name in parts(cfg)})


def left_alone(cfg: ModelConfig) -> set[str]:
    """Modules of folders that are linears and are not quantized, but for the head."""
    found = set()
    for name in kept(cfg):
        part = parts(cfg).get(short(name))
        found.add(name if part is None else name.removesuffix(short(name)) + part.whole)
    return found


def parts(cfg: ModelConfig) -> dict[str, Part]:
    """Linears that folders hold among the rows of others, by their names inside a block."""
    return dict(next(iter(FAMILIES[cfg.family].HF.values())).parts)


def quantized(cfg: ModelConfig, layer: int) -> Shapes:
    """Names and [out, in] of a block's linears that are quantized."""
    shapes = FAMILIES[cfg.family].linears(cfg, layer)
    return {name: shape for name, shape in shapes.items() if name not in kept(cfg)}


def staying(cfg: ModelConfig, layer: int) -> Shapes:
    """Names inside the block and [out, in] of a block's linears that stay."""
    shapes = FAMILIES[cfg.family].linears(cfg, layer)
    return {short(name): shape for name, shape in shapes.items() if name in kept(cfg)}


def stays(cfg: ModelConfig, layer: int, name: str) -> bool:
    """Whether a linear of that name inside the block stays."""
    return f"model.layers.{layer}.{name}" in kept(cfg) and name in staying(cfg, layer)


def in_one(cfg: ModelConfig, layer: int, linears: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Linears that stay, [out, in] by their names inside the block, as folders hold them: parts in one."""
    own, held = parts(cfg), {name: w for name, w in linears.items() if name not in parts(cfg)}
    found = [
        (own[name], own[name].rows(cfg.layers[layer]), _turned(w, own[name], cfg, layer))
        for name, w in linears.items()
        if name in own
    ]
    for whole in {part.whole for part, *_ in found}:
        rows = [(at, w) for part, at, w in found if part.whole == whole]
        held[whole] = np.empty((sum(len(at) for at, _ in rows), rows[0][1].shape[1]), np.float32)
        for at, w in rows:
            held[whole][at] = w
    return held


def apart(cfg: ModelConfig, layer: int, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `in_one` gave these of."""
    out = {}
    for name, (n, k) in staying(cfg, layer).items():
        part = parts(cfg).get(name)
        if part is None:
            out[name] = held[name].reshape(n, k)
            continue
        w, heads = held[part.whole][part.rows(cfg.layers[layer])], part.turned
        if heads is not None:
            w = w.reshape(heads(cfg.layers[layer]), -1, w.shape[1]).swapaxes(1, 2)
        out[name] = np.ascontiguousarray(w).reshape(n, k)
    return out


def share(cfg: ModelConfig, layer: int, name: str) -> float:
    """Part of the tokens that a linear sees, if experts see all alike."""
    mlp = cfg.layers[layer].mlp
    return mlp.taken / mlp.n if isinstance(mlp, ExpertsConfig) and ".mlp.experts." in name else 1.0


def _turned(w: np.ndarray, part: Part, cfg: ModelConfig, layer: int) -> np.ndarray:
    """A part's rows as files have them: matrices that files hold transposed are turned back."""
    if part.turned is None:
        return w
    heads = part.turned(cfg.layers[layer])
    return w.reshape(heads, -1, w.shape[1]).swapaxes(1, 2).reshape(heads * w.shape[1], -1)
