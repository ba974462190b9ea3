"""Mixtures of experts on the device. Who takes which expert is known there alone: launches are as large as
the step allows, and blocks that find no work end at once (src/routes.cu, src/experts.cu).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.inputs import GRAPH_ROWS
from tinychat.kernels_cuda.linear import THREADS, DeviceLinear, row_length
from tinychat.kernels_cuda.program import Buffer, Program

MOST = 1024  # experts: src/routes.cu
MOST_GROUPS = 64  # of experts
FEW, MANY = 8, 32  # rows of an expert in one block


@dataclass(eq=False)
class Routes:
    """Choice of experts for each row: the buffers of src/routes.cu."""

    experts: int
    taken: int
    chosen: Buffer
    weights: Buffer
    pairs: Buffer
    work: Buffer

    def columns(self, rows: int) -> int:
        """Rows of an expert in one block. No result depends on it."""
        few = rows <= GRAPH_ROWS or rows * self.taken <= FEW * self.experts
        return FEW if few else MANY

    def pieces(self, rows: int) -> int:
        """The most blocks side by side that so many rows can need."""
        pairs = rows * self.taken
        return min(pairs, pairs // self.columns(rows) + self.experts)


@dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighed (`Ops.route`). bias, each: a float for each expert, or None."""

    normalize: bool
    sigmoid: bool = False
    bias: Memory | None = None
    scale: float = 1.0
    each: Memory | None = None
    groups: tuple[int, int] = (1, 1)


def route(p: Program, scores: Buffer, experts: int, taken: int, rule: Rule) -> Routes:
    """scores: floats [rows, experts]."""
    kernel = p.modules.kernel("routes.cu", "route")
    r = Routes(experts, taken, *(p.floats(n * taken) for n in (1, 1, 1, 3)))
    p.record(
        [scores, r.chosen, r.weights, r.pairs, r.work],
        lambda z: p.device.launch(
            kernel, (1,), 1024, scores.memory, r.chosen.memory, r.weights.memory, r.pairs.memory,
            r.work.memory, z.rows, experts, taken, int(rule.normalize), int(rule.sigmoid), float(rule.scale),
            rule.bias, rule.each, *rule.groups, r.columns(z.rows), r.pieces(z.rows),
        ),
    )  # fmt: skip
    return r


def products(
    p: Program,
    r: Routes,
    weights: Mapping[int, DeviceLinear],
    x: Buffer,
    share: int,
    to: Buffer,
    column: int,
    cols: int,
) -> None:
    """Each pair with its expert, for the experts that have a weight here, all of one shape: into the columns
    of `to` [pairs, cols] from `column` on. x: halves, `share` pairs a row.
    """
    shape = next(iter(weights.values())).shape
    p.experts.extend(weights.values())
    table = np.zeros((r.experts, 4), np.uint64)
    for e, w in weights.items():
        table[e] = [0 if m is None else m.address for m in (w.codes, w.meta, w.zeros, w.bias)]
    addresses = p.upload(table)
    if any(w.perm is not None for w in weights.values()):
        x, share = _reordered(p, r, weights, x, share), 1
    tiles = {FEW: 1, MANY: 1 if shape.form.bits == 32 else 2}
    kernels = {
        columns: p.modules.kernel("experts.cu", f"experts_{tiles[columns]}x{columns}", shape.defines)
        for columns in tiles
    }

    def launch(z) -> None:
        columns = r.columns(z.rows)
        p.device.launch(
            kernels[columns], (r.pieces(z.rows), -(-shape.tiles // tiles[columns])), THREADS, addresses,
            r.work.memory, r.pairs.memory, x.memory, to.memory[4 * column :], shape.n, shape.stages,
            shape.group, shape.groups, row_length(shape.k), cols, share,
        )  # fmt: skip

    p.record([x, r.pairs, r.work, to], launch)


def _reordered(p: Program, r: Routes, weights: Mapping[int, DeviceLinear], x: Buffer, share: int) -> Buffer:
    """A row of halves for each pair, in the order of its expert's inputs."""
    n = next(iter(weights.values())).shape.k
    orders = np.zeros(r.experts, np.uint64)
    for e, w in weights.items():
        orders[e] = 0 if w.perm is None else w.perm.address
    perms, kernel, ld = p.upload(orders), p.modules.kernel("routes.cu", "reorder_pairs"), row_length(n)
    out = p.halves(n, r.taken)
    p.record(
        [x, r.chosen, out],
        lambda z: p.device.launch(
            kernel, (-(-ld // THREADS), z.rows * r.taken), THREADS, x.memory, perms, r.chosen.memory,
            out.memory, n, ld, share,
        ),
    )  # fmt: skip
    return out


def add(p: Program, r: Routes, x: Buffer, n: int, to: Buffer) -> None:
    """to [rows, n] += the weighted sum of each row's pairs, x [pairs, n]."""
    kernel = p.modules.kernel("routes.cu", "add_pairs")
    p.record(
        [x, r.weights, to],
        lambda z: p.device.launch(
            kernel, (-(-n // THREADS), z.rows), THREADS, x.memory, r.weights.memory, to.memory, n, r.taken
        ),
    )
