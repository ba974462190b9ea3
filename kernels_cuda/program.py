"""A model's kernels in their order, recorded once and launched for every step.

Buffers have room for the largest step; what is no longer read is written again. What changes from step to
step lies where kernels look it up (inputs.py), so what a launch is told depends on a step's `Size` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from tinychat.kernels_cuda import linear
from tinychat.kernels_cuda.attention import STRETCH, Shape
from tinychat.kernels_cuda.driver import Kernel, Memory
from tinychat.kernels_cuda.head import Head
from tinychat.kernels_cuda.inputs import Inputs, Size
from tinychat.kernels_cuda.linear import DeviceLinear, row_length
from tinychat.kernels_cuda.modules import Modules
from tinychat.kernels_cuda.pool import Pool


@dataclass(eq=False)
class Buffer:
    """Memory that an op writes and later ones read; `memory` is known once the program is built."""

    row_bytes: int
    memory: Any = None
    first: int = -1
    last: int = -1


@dataclass(eq=False)
class _Record:
    uses: list[Buffer]
    launch: Callable[[Size], None]
    by_host: bool = False


class Stage(NamedTuple):
    """Launches that can be one graph, or what the host does between two of these."""

    launch: Callable[[Size], None]
    by_host: bool = False


@dataclass
class Program:
    """Record with the verbs below, then `build`; `launch` then does all of it, for a step's inputs."""

    modules: Modules
    max_rows: int
    pools: list[Any] = field(default_factory=list)  # of each memory: a Pool, or a StatePool
    records: list[_Record] = field(default_factory=list)
    weights: list[DeviceLinear] = field(default_factory=list)
    experts: list[DeviceLinear] = field(default_factory=list)  # of which a step reads some

    def __post_init__(self) -> None:
        self.device = self.modules.device
        self.inputs = Inputs(self.device, [p.shape.group for p in self.pools])
        self._output: Head | None = None

    def floats(self, cols: int) -> Buffer:
        """A float a column."""
        return Buffer(4 * cols)

    def halves(self, cols: int, each: int = 1) -> Buffer:
        """Halves that a linear of so many inputs reads, `each` times a row."""
        return Buffer(2 * row_length(cols) * each)

    def record(self, uses: Sequence[Buffer], launch: Callable[[Size], None]) -> None:
        """`launch` puts kernels on the stream that read and write these buffers."""
        self.records.append(_Record(list(uses), launch))

    def host(self, uses: Sequence[Buffer], work: Callable[[Size], None]) -> None:
        """`work` is done by the host, when all before it has been put on the stream: it copies from and to
        these buffers.
        """
        self.records.append(_Record(list(uses), work, by_host=True))

    def rows_kernel(self, name: str) -> Kernel:
        """A kernel of rows.cu."""
        return self.modules.kernel("rows.cu", name)

    def embed(self, w: DeviceLinear, scale: float) -> Buffer:
        """Rows of the embedding for the step's ids."""
        s, out = w.shape, self.floats(w.shape.k)
        kernel = self.modules.kernel("embed.cu", "embed", s.form.defines)
        self.record(
            [out],
            lambda z: self.device.launch(
                kernel, (-(-s.k // 256), z.rows), 256, w.codes, w.meta, w.zeros, self.inputs.ids(z),
                out.memory, s.k, s.stages, s.group, s.groups, float(scale),
            ),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Buffer, weight: Memory, n: int, eps: float) -> Buffer:
        """RMS norm, as halves."""
        kernel, out = self.rows_kernel("rms_norm"), self.halves(n)
        self.record(
            [x, out],
            lambda z: self.device.launch(
                kernel, (z.rows,), 256, x.memory, weight, out.memory, n, row_length(n), float(eps)
            ),
        )
        return out

    def rms_norm_add(self, x: Buffer, weight: Memory, n: int, eps: float, to: Buffer) -> None:
        """Added to `to`."""
        kernel = self.rows_kernel("rms_norm_add")
        self.record(
            [x, to],
            lambda z: self.device.launch(kernel, (z.rows,), 256, x.memory, weight, to.memory, n, float(eps)),
        )

    def norm_heads(
        self, x: Buffer, weight: Memory, n: int, offset: int, heads: int, cols: int, eps: float
    ) -> None:
        """RMS norm in place: `heads` of n columns each, from column `offset` on."""
        kernel = self.rows_kernel("norm_heads")
        self.record(
            [x],
            lambda z: self.device.launch(
                kernel, (z.rows, heads), 256, x.memory, weight, n, offset, cols, float(eps)
            ),
        )

    def gate(self, name: str, x: Buffer, n: int, *how: float, each: int = 1) -> Buffer:
        """silu_mul, gelu_mul, or clamped_mul by its limit and alpha, as halves."""
        return self._halved(name, x, n, *how, each=each)

    def halve(self, x: Buffer, n: int, perm: Memory | None) -> Buffer:
        """Floats as halves, in the order of `perm`."""
        return self._halved("halve", x, n, perm)

    def reorder(self, x: Buffer, n: int, perm: Memory) -> Buffer:
        """Halves in the order of `perm`."""
        return self._halved("reorder", x, n, perm)

    def _halved(self, name: str, x: Buffer, n: int, *how: Any, each: int = 1) -> Buffer:
        kernel, out, ld = self.rows_kernel(name), self.halves(n, each), row_length(n)
        self.record(
            [x, out],
            lambda z: self.device.launch(
                kernel, (-(-ld // 256), z.rows * each), 256, x.memory, *how, out.memory, n, ld
            ),
        )
        return out

    def relu_square(self, x: Buffer, n: int, each: int = 1) -> Buffer:
        """max(x, 0)², as halves."""
        return self._halved("relu_square", x, n, each=each)

    def sigmoid_mul(self, x: Buffer, gate: Buffer, n: int, gates: int) -> None:
        """Halves times σ of floats, in place."""
        kernel, ld = self.rows_kernel("sigmoid_mul"), row_length(n)
        self.record(
            [x, gate],
            lambda z: self.device.launch(
                kernel, (-(-n // 256), z.rows), 256, gate.memory, x.memory, n, ld, n // gates
            ),
        )

    def split_gates(self, x: Buffer, n: int, queries: int, size: int) -> tuple[Buffer, Buffer]:
        """Heads without the gates that stand behind each of the first, and these: floats."""
        kernel, heads, gates = self.rows_kernel("split_gates"), self.floats(n - queries), self.floats(queries)
        self.record(
            [x, heads, gates],
            lambda z: self.device.launch(
                kernel, (-(-n // 256), z.rows), 256, x.memory, heads.memory, gates.memory, n, 2 * queries,
                size,
            ),
        )  # fmt: skip
        return heads, gates

    def norm_gated(
        self,
        x: Buffer,
        weight: Memory | None,
        gate: Buffer,
        n: int,
        groups: int,
        gate_cols: int,
        eps: float,
        gated: bool = False,
    ) -> Buffer:
        """Groups of n columns, normed and times silu of the gate's first ones, as halves; x is written over.
        gated: the gate comes before the norm.
        """
        kernel, out, ld = self.rows_kernel("norm_gated"), self.halves(n * groups), row_length(n * groups)
        weights = weight.size // 4 if weight else 1
        self.record(
            [x, gate, out],
            lambda z: self.device.launch(
                kernel, (z.rows, groups), 256, x.memory, weight, gate.memory, out.memory, n, weights,
                gate_cols, ld, int(gated), float(eps),
            ),
        )  # fmt: skip
        return out

    def multiply(self, x: Buffer, factors: Memory, n: int) -> None:
        """Columns of floats times a factor each, in place."""
        kernel, grid = self.rows_kernel("multiply"), -(-n // 256)
        self.record([x], lambda z: self.device.launch(kernel, (grid, z.rows), 256, x.memory, factors, n))

    def multiply_halves(self, x: Buffer, factors: Memory, n: int) -> None:
        """The same of halves."""
        kernel, grid, ld = self.rows_kernel("multiply_halves"), -(-n // 256), row_length(n)
        self.record([x], lambda z: self.device.launch(kernel, (grid, z.rows), 256, x.memory, factors, n, ld))

    def linear(self, w: DeviceLinear, x: Buffer, to: Buffer, column: int, cols: int, add: bool) -> None:
        """Into (or added to) the columns of `to` from `column` on."""
        self.weights.append(w)
        self.record(
            [x, to],
            lambda z: linear.launch(self.modules, w, x.memory, to.memory[4 * column :], z.rows, cols, add),
        )

    def rope_table(self, frequencies: np.ndarray, magnitude: float) -> Buffer:
        """Turns of the step's rows: [rows, pairs, 2]."""
        pairs = len(frequencies)
        table, f = self.floats(2 * pairs), self.upload(frequencies.astype(np.float64))
        attention = next(p.attention for p in self.pools if isinstance(p, Pool))
        self.record(
            [table],
            lambda z: attention.turns(self.inputs.positions(z), f, table.memory, z.rows, pairs, magnitude),
        )
        return table

    def attend(
        self,
        qkv: Buffer,
        table: Buffer | None,
        pairs: int,
        memory: int,
        layer: int,
        window: int,
        scale: float,
        cap: float,
        sinks: Memory | None = None,
        slope: float = 0.0,
        original: int = 1,
    ) -> Buffer:
        """Turn, append, attend, score: as halves. layer: of the memory."""
        pool = self.pools[memory]
        a, s = pool.attention, pool.shape
        q, totals, out = Buffer(s.query_bytes), Buffer(8 * s.heads), self.halves(s.heads * s.size)

        def launch(z: Size) -> None:
            extent = z.extents[memory]
            call = a.call(
                q=q.memory, totals=totals.memory, pool=pool.blocks, facts=self.inputs.facts(z, memory),
                rows=z.rows, layer=layer, window=window, scale=scale, cap=cap, sinks=sinks,
            )  # fmt: skip
            turns = table.memory if table else None
            a.append(call, qkv.memory, turns, pairs, self.inputs.positions(z), slope, original)
            if z.few:
                a.spread(call, out.memory, z.few, extent.few, extent.stretches)
            if z.few < z.rows:
                a.walk(call, out.memory, extent.few, extent.pieces - extent.few)
            if extent.watches:
                a.score(call, pool.scores, extent.watches, extent.stretches * STRETCH)

        self.record([qkv, q, totals, out, *([table] if table else [])], launch)
        return out

    def head(self, w: DeviceLinear, x: Buffer, scale: float, cap: float) -> None:
        """The last op: logits of the rows that are asked for."""
        self.weights.append(w)
        self._output = Head(self.modules, w, x, scale, cap)
        self.record([x], lambda z: None)  # x lives to the end

    @property
    def output(self) -> Head:
        """Buffer that `head` recorded."""
        if self._output is None:
            raise RuntimeError("the program has no head")
        return self._output

    def build(self) -> None:
        """Give every buffer memory: what is no longer read is written again."""
        for i, r in enumerate(self.records):
            for b in r.uses:
                b.first = i if b.first < 0 else b.first
                b.last = i
        free: dict[int, list[Memory]] = {}
        for i, r in enumerate(self.records):
            for b in r.uses:
                if b.first == i and b.memory is None:
                    spare = free.get(b.row_bytes)
                    b.memory = spare.pop() if spare else self.device.allocate(self.max_rows * b.row_bytes)
            for b in {id(b): b for b in r.uses}.values():
                if b.last == i:
                    free.setdefault(b.row_bytes, []).append(b.memory)
        self.output.build()

    def upload(self, a: np.ndarray) -> Memory:
        """An array that stays."""
        memory = self.device.allocate(a.nbytes)
        self.device.upload(memory, np.ascontiguousarray(a))
        return memory

    @cached_property
    def stages(self) -> list[Stage]:
        """Everything but the head, in its order; the last ones are launches."""
        stages: list[Stage] = []
        for by_host, records in groupby(self.records, lambda r: r.by_host):
            whole = list(records)
            stages += (
                [Stage(r.launch, True) for r in whole] if by_host else [Stage(partial(_launched, whole))]
            )
        return stages


def _launched(records: list[_Record], size: Size) -> None:
    for r in records:
        r.launch(size)


def program_sources(shapes: Sequence[Shape]) -> list[tuple[str, dict[str, str]]]:
    """Sources of a program, apart from what its weights need. shapes: of its attentions."""
    return [(f"{name}.cu", shape.defines) for shape in shapes for name in ("cache", "attention")] + [
        (f"{name}.cu", {}) for name in ("rows", "logits")
    ]
