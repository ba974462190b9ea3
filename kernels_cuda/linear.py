"""Linears on the device: a weight in its form, and which variant of the kernel runs how many rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.layout import TILE, Shape
from tinychat.kernels_cuda.modules import Modules

ROW_STEP = 64  # halves: rows of activations are as long as whole stages
THREADS = 256
MANY = 64  # rows up to which a weight is read once


def row_length(k: int) -> int:
    """Halves from one row of activations to the next; zero from k on."""
    return -(-k // ROW_STEP) * ROW_STEP


@dataclass(frozen=True)
class DeviceLinear:
    """A packed weight on the device. perm: int32, the order in which it takes its inputs."""

    shape: Shape
    codes: Memory
    meta: Memory | None
    zeros: Memory | None
    bias: Memory | None
    perm: Memory | None = None


def variant(shape: Shape, rows: int, processors: int) -> tuple[str, tuple[int, int]]:
    """Kernel and grid: tiles of outputs and rows a block. The result's bits do not depend on it.

    Few rows: two tiles a block read the activations half as often; where that left too few blocks for every
    processor to have four, one tile spreads better. Many rows: src/wide.cuh, unless that left half of the
    processors without a block.
    """

    def blocks(tiles: int, columns: int) -> tuple[int, int]:
        return -(-rows // columns), -(-shape.tiles // tiles)

    if rows > MANY and 2 * math.prod(blocks(8, 128)) >= processors:
        tiles, columns = 8, 128
    elif rows > 16:
        tiles, columns = 1 if shape.form.bits == 32 else 2, MANY
    else:
        tiles = 2 if shape.form.deep and shape.tiles >= 8 * processors else 1
        columns = 8 if rows <= 8 else 16
    return f"linear_{tiles}x{columns}", blocks(tiles, columns)


def launch(
    modules: Modules,
    w: DeviceLinear,
    x: Memory,
    y: Memory,
    rows: int,
    ldy: int,
    add: bool = False,
    scale: float = 1.0,
    cap: float = 0.0,
    name: str | None = None,
) -> None:
    """y[rows, n] = x wᵀ + bias (or added to y).

    x: halves [rows, row_length(k)]; ldy: floats from one row of y to the next.
    scale, cap: for logits. name: a variant, for tests.
    """
    s = w.shape
    chosen, grid = variant(s, rows, modules.device.processors)
    if name:
        tiles, columns = (int(n) for n in name.removeprefix("linear_").split("x"))
        chosen, grid = name, (-(-rows // columns), -(-s.tiles // tiles))
    kernel = modules.kernel("linear.cu", chosen, s.defines)
    modules.device.launch(
        kernel, grid, THREADS, w.codes, w.meta, w.zeros, x, w.bias, y, rows, s.n, s.stages, s.group, s.groups,
        row_length(s.k), ldy, int(add), float(scale), float(cap),
    )  # fmt: skip


def upload(
    modules: Modules,
    shape: Shape,
    parts: Mapping[str, np.ndarray | Sequence[np.ndarray] | None],
    allocate: Callable[[int], Memory] | None = None,
) -> DeviceLinear:
    """Packed arrays (codes, meta, zeros, bias, perm) to the device; each may be in pieces, one behind the
    other.
    """
    memory: dict[str, Memory] = {}
    for name, part in parts.items():
        pieces, at = [part] if isinstance(part, np.ndarray) else part or [], 0
        if pieces:
            memory[name] = (allocate or modules.device.allocate)(sum(a.nbytes for a in pieces))
        for a in pieces:
            modules.device.upload(memory[name][at : at + a.nbytes], a)
            at += a.nbytes
    rest = (memory.get(name) for name in ("meta", "zeros", "bias", "perm"))
    return DeviceLinear(shape, memory["codes"], *rest)


__all__ = ["ROW_STEP", "TILE", "DeviceLinear", "launch", "row_length", "upload", "variant"]
