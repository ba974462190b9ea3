"""Which linears of a block are quantized: all but those that choose, which stay as they are stored."""

from __future__ import annotations

from functools import lru_cache

from tinychat.models import FAMILIES
from tinychat.network.config import ExpertsConfig, ModelConfig
from tinychat.quantize.nodes import Names, short

Shapes = dict[str, tuple[int, int]]


class _Choosing(Names):
    """Hears which linears choose."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def router(self, name: str):
        self.found.add(name)
        return super().router(name)


@lru_cache(maxsize=4)
def routers(cfg: ModelConfig) -> frozenset[str]:
    """Names of linears that choose experts, and of their gates."""
    choosing = _Choosing()
    FAMILIES[cfg.family].load(choosing, cfg.without_further)
    return frozenset(choosing.found)


def quantized(cfg: ModelConfig, layer: int) -> Shapes:
    """Names and [out, in] of a block's linears that are quantized."""
    shapes = FAMILIES[cfg.family].linears(cfg, layer)
    if not cfg.n_experts:
        return shapes
    return {name: shape for name, shape in shapes.items() if name not in routers(cfg)}


def choosing(cfg: ModelConfig, layer: int) -> Shapes:
    """Names inside the block and [out, in] of a block's linears that choose."""
    if not cfg.n_experts:
        return {}
    shapes = FAMILIES[cfg.family].linears(cfg, layer)
    return {short(name): shape for name, shape in shapes.items() if name in routers(cfg)}


def chooses(cfg: ModelConfig, name: str) -> bool:
    """Whether a module of that name inside a block chooses."""
    return bool(cfg.n_experts) and name in {short(whole) for whole in routers(cfg)}


def share(cfg: ModelConfig, layer: int, name: str) -> float:
    """Part of the tokens that a linear sees, if experts see all alike."""
    mlp = cfg.layers[layer].mlp
    return mlp.taken / mlp.n if isinstance(mlp, ExpertsConfig) and ".mlp.experts." in name else 1.0
