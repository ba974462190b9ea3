"""A model's kernels in their order, recorded once and replayed for every step.

Buffers have room for the largest step; what is no longer read is written again. What changes from step to
step (ids, position, length, block table) lies in one fixed piece of device memory, so a step of up to 16
rows is a CUDA graph: one copy in, one call, one copy out. A graph is made for each size of step, the second
time that it occurs: by then every kernel has been loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinychat.kernels_cuda import head, linear
from tinychat.kernels_cuda.attention import SPAN, Attention, Call, Shape
from tinychat.kernels_cuda.driver import Graph, Kernel, Memory
from tinychat.kernels_cuda.head import Head
from tinychat.kernels_cuda.linear import DeviceLinear, row_length
from tinychat.kernels_cuda.modules import Modules

GRAPH_ROWS = 16
SPREAD_ROWS = 32  # attention of more rows has enough to do without splitting the context
GRAPHS = 64  # kept; the one that waited longest goes first
HEADER = 16  # of 4 bytes: src/step.cuh


@dataclass(frozen=True)
class Size:
    """What a step's launches depend on.

    tail     last rows, which get logits
    spans    of attention, for all that is cached
    watched  last rows whose attention is scored, apart from each other or summed
    wanted   of the logits: head.LOGITS, ARGMAX or TOP
    """

    rows: int
    tail: int
    spans: int
    watched: int = 0
    apart: bool = False
    wanted: str = head.LOGITS


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


@dataclass
class Inputs:
    """Where a step's inputs lie: on the device, and pinned on the host."""

    device: Memory
    host: np.ndarray
    max_rows: int

    @property
    def step(self) -> Memory:
        """`struct Step`."""
        return self.device[: 4 * HEADER]

    @property
    def ids(self) -> Memory:
        """int32 [rows]."""
        return self.device[4 * HEADER : 4 * (HEADER + self.max_rows)]

    @property
    def blocks(self) -> Memory:
        """int32, the block table."""
        return self.device[4 * (HEADER + self.max_rows) :]


@dataclass
class Program:
    """Record with the verbs below, `build`, `set_cache`; then `run`."""

    modules: Modules
    attention: Attention
    max_rows: int
    records: list[_Record] = field(default_factory=list)
    weights: list[DeviceLinear] = field(default_factory=list)
    experts: list[DeviceLinear] = field(default_factory=list)  # of which a step reads some

    def __post_init__(self):
        self.device = self.modules.device
        self.inputs: Inputs | None = None
        self.pool: Memory | None = None
        self._scores: Memory | None = None
        self._head: Head | None = None
        self._graphs: OrderedDict[Size, Graph | None] = OrderedDict()
        self.steps = 0  # so far

    # Recording

    def floats(self, cols: int) -> Buffer:
        """A float a column."""
        return Buffer(4 * cols)

    def halves(self, cols: int, each: int = 1) -> Buffer:
        """What a linear of so many inputs reads, `each` times a row."""
        return Buffer(2 * row_length(cols) * each)

    def record(self, uses: Sequence[Buffer], launch: Callable[[Size], None]) -> None:
        """`launch` puts kernels on the stream that read and write these buffers."""
        self.records.append(_Record(list(uses), launch))

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
                kernel, (-(-s.k // 256), z.rows), 256, w.codes, w.meta, w.zeros, self.inputs.ids, out.memory,
                s.k, s.stages, s.group, s.groups, float(scale),
            ),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Buffer, weight: Memory, n: int, eps: float) -> Buffer:
        """As halves."""
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

    def norm_spans(
        self, x: Buffer, weight: Memory, n: int, offset: int, spans: int, cols: int, eps: float
    ) -> None:
        """In place: `spans` of n columns each, from column `offset` on."""
        kernel = self.rows_kernel("norm_spans")
        self.record(
            [x],
            lambda z: self.device.launch(
                kernel, (z.rows, spans), 256, x.memory, weight, n, offset, cols, float(eps)
            ),
        )

    def gate(self, name: str, x: Buffer, n: int, each: int = 1) -> Buffer:
        """silu_mul or gelu_mul, as halves."""
        return self._halved(name, x, n, each=each)

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
        self.record(
            [table],
            lambda z: self.attention.turns(self.inputs.step, f, table.memory, z.rows, pairs, magnitude),
        )
        return table

    def attend(self, qkv: Buffer, table: Buffer | None, pairs: int, layer: int, window: int) -> Buffer:
        """Turn, append, attend, score: as halves."""
        a, s = self.attention, self.attention.shape
        q, totals, out = Buffer(s.query_bytes), Buffer(8 * s.heads), self.halves(s.heads * s.size)

        def launch(z: Size) -> None:
            inputs = self.inputs
            call = Call(inputs.step, q.memory, self.pool, inputs.blocks, totals.memory, layer, z.rows, window)
            a.append(call, qkv.memory, table.memory if table else None, pairs)
            if z.rows <= SPREAD_ROWS:
                a.spread(call, out.memory, z.spans)
            else:
                a.walk(call, out.memory)
            if z.watched:
                a.score(call, self._scores, z.watched, z.apart, z.spans * SPAN)

        self.record([qkv, q, totals, out, *([table] if table else [])], launch)
        return out

    def head(self, w: DeviceLinear, x: Buffer, scale: float, cap: float) -> None:
        """The last op: logits of the tail."""
        self.weights.append(w)
        self._head = Head(self.modules, w, x, scale, cap)
        self.record([x], lambda z: None)  # x lives to the end

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
        self._head.build()

    def upload(self, a: np.ndarray) -> Memory:
        """An array that stays."""
        memory = self.device.allocate(a.nbytes)
        self.device.upload(memory, np.ascontiguousarray(a))
        return memory

    # Running

    def set_cache(self, n_blocks: int) -> None:
        """A pool of so many blocks, zeroed; if it grows, what it held stays."""
        size, before = n_blocks * self.attention.shape.block_bytes, self.pool
        if before is not None and before.size >= size:
            self.pool = self.inputs = before = None
        pool = self.device.allocate(size)
        n = HEADER + self.max_rows + n_blocks
        inputs = Inputs(self.device.allocate(4 * n), self.device.pinned((n,), np.int32), self.max_rows)
        self.device.clear(pool)
        if before is not None:
            self.device.copy(pool[: before.size], before)
        self.device.synchronize()
        self._graphs.clear()  # they have the addresses in them
        self.pool, self.inputs = pool, inputs

    def set_table(self, block_table: np.ndarray) -> None:
        """The block table alone, for what happens between steps."""
        at = HEADER + self.max_rows
        self.inputs.host[at : at + len(block_table)] = block_table
        self.device.upload(self.inputs.blocks, self.inputs.host[at : at + len(block_table)])

    def run(
        self,
        ids: np.ndarray,
        position: int,
        length: int,
        block_table: np.ndarray,
        wanted: str,
        out: np.ndarray,
        scores: np.ndarray | None = None,
        watched: int = 0,
        inverse_temperature: float = 0.0,
    ) -> None:
        """One step. Fills `out` [last rows, head.columns] with what is wanted of their logits, and adds to
        scores. inverse_temperature: of head.TOP's total.
        """
        self.steps += 1
        rows, tail = len(ids), len(out)
        self._put_inputs(ids, position, length, block_table, inverse_temperature)
        watched = watched if scores is not None else 0
        apart = scores is not None and len(scores) == watched
        size = Size(rows, tail, spans_for(length + rows), watched, apart, wanted)
        if size.watched:
            self._reserve_scores(size)
            if not apart:
                self._put_scores(size, scores)
        if rows <= GRAPH_ROWS:
            self._replay(size)
            if tail:
                self._head.fetch(wanted, out)
        else:
            self._launch_body(size)
            for first in range(0, tail, head.ROWS):
                part = out[first : first + head.ROWS]
                self._launch_head(size, first, len(part))
                self._head.fetch(wanted, part)
        if size.watched:
            self._fetch_scores(size, scores)
        self.device.synchronize()

    def logits(self, row: int) -> np.ndarray:
        """The logits of one of the last step's last rows, whatever was wanted of them: float32 [vocab]."""
        return self._head.logits(row)

    def _put_inputs(
        self,
        ids: np.ndarray,
        position: int,
        length: int,
        block_table: np.ndarray,
        inverse_temperature: float,
    ) -> None:
        host, table = self.inputs.host, HEADER + self.max_rows
        host[:2] = position, length
        host[2:3].view(np.float32)[0] = inverse_temperature
        host[HEADER : HEADER + len(ids)] = ids
        host[table : table + len(block_table)] = block_table
        if len(ids) <= GRAPH_ROWS:  # one copy: what lies between is small
            self.device.upload(self.inputs.device, host[: table + len(block_table)])
        else:
            self.device.upload(self.inputs.device, host[: HEADER + len(ids)])
            self.device.upload(self.inputs.blocks, host[table : table + len(block_table)])

    def _replay(self, size: Size) -> None:
        def launches() -> None:
            self._launch_body(size)
            if size.tail:
                self._launch_head(size, 0, size.tail)

        if size not in self._graphs:
            launches()
            self._graphs[size] = None
        else:
            if self._graphs[size] is None:
                self._graphs[size] = self.device.capture(launches)
            self._graphs[size].replay()
        self._graphs.move_to_end(size)
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)

    def _launch_body(self, size: Size) -> None:
        for r in self.records:
            r.launch(size)

    def _launch_head(self, size: Size, first: int, n: int) -> None:
        self._head.launch(self.inputs.step, size.wanted, size.rows - size.tail + first, n)

    def _score_shape(self, size: Size) -> tuple[int, ...]:
        s = self.attention.shape
        return (size.watched if size.apart else 1), s.layers, s.kv_heads, size.spans * SPAN

    def _reserve_scores(self, size: Size) -> None:
        need = 4 * int(np.prod(self._score_shape(size)))
        if self._scores is None or self._scores.size < need:
            self._graphs.clear()  # they know where the old ones were
            self._scores = None
            self._scores = self.device.allocate(need)

    def _put_scores(self, size: Size, scores: np.ndarray) -> None:
        """What the rows' are added to, one after the other."""
        put = np.zeros(self._score_shape(size), np.float32)
        n = min(scores.shape[-1], put.shape[-1])
        put[..., :n] = scores[..., :n]
        self.device.upload(self._scores, put)

    def _fetch_scores(self, size: Size, scores: np.ndarray) -> None:
        got = np.empty(self._score_shape(size), np.float32)
        self.device.download(got, self._scores)
        self.device.synchronize()
        n = min(scores.shape[-1], got.shape[-1])
        if size.apart:
            scores[..., :n] += got[..., :n]
        else:
            scores[..., :n] = got[..., :n]


def program_sources(shape: Shape) -> list[tuple[str, dict[str, str]]]:
    """What a program is compiled from, apart from what its weights need."""
    return [(f"{name}.cu", shape.defines) for name in ("cache", "attention")] + [
        (f"{name}.cu", {}) for name in ("rows", "logits")
    ]


def spans_for(slots: int) -> int:
    """A power of two of spans that covers them: few sizes of graph, as a conversation grows."""
    return 1 << max(2, (-(-slots // SPAN) - 1).bit_length())
