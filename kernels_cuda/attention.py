"""The KV cache and attention on the device: layout, launches, and how a few rows spread over the GPU."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_uint64
from dataclasses import dataclass

from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.linear import row_length
from tinychat.kernels_cuda.modules import Modules

SLOTS = 16  # in a block
STRETCH = 64  # slots that attention takes at once
QUERIES = 16  # of a warp
MAX_HEAD = 256


@dataclass(frozen=True)
class Shape:
    """Attention over one memory of a model. size: channels of a head; bits: of the cache."""

    layers: int
    heads: int
    kv_heads: int
    size: int
    bits: int

    @property
    def defines(self) -> dict[str, str]:
        """Definitions that cache.cu and attention.cu are compiled with."""
        return {"HEAD": str(self.head), "KV_BITS": str(self.bits)}

    @property
    def head(self) -> int:
        """Channels with padding."""
        return -(-self.size // 32) * 32

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of 16 slots in all layers: `src/cache.cuh` says how they lie."""
        scales = SLOTS * (self.head // 32) * 2 if self.bits == 8 else 0
        return self.layers * self.kv_heads * 2 * (SLOTS * self.head * self.bits // 8 + scales)

    @property
    def query_bytes(self) -> int:
        """Bytes of a row's queries."""
        return self.heads * self.head * 2


class Call(ctypes.Structure):
    """Attention of one layer in one step: `struct Attention` of src/cache.cuh, field by field."""

    _fields_ = [
        *((name, c_uint64) for name in ("q", "pool", "tables", "places", "pieces", "watches", "totals")),
        ("sinks", c_uint64),
        *((name, c_int) for name in ("rows", "layer", "layers", "heads", "kv_heads", "size", "ld", "window")),
        ("scale", c_float),
        ("cap", c_float),
    ]  # fmt: skip


class Attention:
    """Launches for one memory of a model."""

    def __init__(self, modules: Modules, shape: Shape, workspace: Memory):
        """workspace: for stretches that are not yet merged; rows that do not fit go in turns."""
        self.shape, self.device, self._workspace = shape, modules.device, workspace
        self._kernels = {
            name: modules.kernel(source, name, shape.defines)
            for source, names in (
                ("cache.cu", ("rope_table", "rope_append", "move_slots", "turn_keys", "value_spread")),
                ("attention.cu", ("attend_stretches", "merge_stretches", "attend_rows", "score_slots")),
            )
            for name in names
        }

    def call(
        self,
        *,
        q: Memory,
        totals: Memory,
        pool: Memory,
        facts: dict[str, Memory],
        rows: int,
        layer: int,
        window: int,
        scale: float,
        cap: float,
        sinks: Memory | None = None,
    ) -> Call:
        """Arguments of all launches for a layer. facts: tables, places, pieces, watches (src/step.cuh).
        sinks: float32 [heads].
        """
        s = self.shape
        addresses = {name: m.address for name, m in facts.items()}
        return Call(
            q=q.address, totals=totals.address, pool=pool.address, rows=rows, layer=layer, layers=s.layers,
            heads=s.heads, kv_heads=s.kv_heads, size=s.size, ld=row_length(s.heads * s.size), window=window,
            scale=scale, cap=cap, sinks=sinks.address if sinks else 0, **addresses,
        )  # fmt: skip

    def row_bytes(self, stretches: int) -> int:
        """Workspace that a row takes when it is spread over so many stretches."""
        return self.shape.heads * stretches * (8 + 4 * self.shape.head)

    def turns(
        self, positions: Memory, frequencies: Memory, table: Memory, rows: int, pairs: int, magnitude: float
    ) -> None:
        """cos and sin of the rows' angles: float32 [rows, pairs, 2]. positions: int32; frequencies: float64
        [pairs].
        """
        kernel = self._kernels["rope_table"]
        self.device.launch(kernel, (rows,), 128, positions, frequencies, table, pairs, float(magnitude))

    def append(
        self,
        c: Call,
        qkv: Memory,
        table: Memory | None,
        pairs: int,
        positions: Memory | None = None,
        slope: float = 0.0,
        original: int = 1,
    ) -> None:
        """Turn queries and keys by `table` (pairs 0: not at all), write keys and values to the cache. slope:
        queries are scaled by the rows' positions.
        """
        grid, how = (c.rows, c.heads + 2 * c.kv_heads), (positions, float(slope), original)
        self.device.launch(self._kernels["rope_append"], grid, 32, c, qkv, table, pairs, *how)

    def spread(self, c: Call, to: Memory, rows: int, pieces: int, stretches: int) -> None:
        """The first rows, in as many pieces, over `stretches` at once (enough for what a row sees), then
        merged.
        """
        s = self.shape
        if c.window:
            stretches = min(stretches, (c.window + QUERIES - 2) // STRETCH + 2)
        at_once = min(rows, self._workspace.size // self.row_bytes(stretches))
        if not at_once:
            return self.walk(c, to, 0, pieces)
        stats = self._workspace
        parts = stats[at_once * s.heads * stretches * 8 :]
        for row in range(0, rows, at_once):
            n = min(at_once, rows - row)
            self.device.launch(
                self._kernels["attend_stretches"], (-(-stretches // 4), s.kv_heads, pieces), 128,
                c, stats, parts, row, n, stretches,
            )  # fmt: skip
            self.device.launch(
                self._kernels["merge_stretches"], (n, s.heads), s.head, c, stats, parts, to, row, stretches
            )

    def walk(self, c: Call, to: Memory, piece: int, pieces: int) -> None:
        """Attention of many rows, the same numbers bit by bit, for so many pieces from `piece` on."""
        warps = 4 if self.shape.head <= 128 else 2
        grid = -(-pieces // warps), c.kv_heads
        self.device.launch(self._kernels["attend_rows"], grid, warps * 32, c, to, piece, pieces)

    def score(self, c: Call, scores: Memory, watches: int, slots: int) -> None:
        """The probability that each slot got from the watched rows, after their attention."""
        grid = -(-slots // SLOTS), c.kv_heads, watches
        self.device.launch(self._kernels["score_slots"], grid, 32, c, scores, slots)

    def move(self, pool: Memory, table: Memory, src: Memory, dst: Memory, n: int) -> None:
        """Slots src over slots dst: int32 [layers, kv_heads, n]."""
        s = self.shape
        grid = n, s.kv_heads, s.layers
        self.device.launch(
            self._kernels["move_slots"], grid, 128, pool, table, src, dst, s.layers, s.kv_heads, n
        )

    def turn(
        self, pool: Memory, table: Memory, delta: Memory, frequencies: Memory, n: int, pairs: int
    ) -> None:
        """Keys of the first n slots by delta positions: int32 [layers, kv_heads, n]."""
        s = self.shape
        self.device.launch(
            self._kernels["turn_keys"], (n, s.kv_heads, s.layers), 32,
            pool, table, delta, frequencies, s.layers, s.kv_heads, n, pairs,
        )  # fmt: skip

    def value_spread(self, pool: Memory, table: Memory, weights: Memory, to: Memory, n: int) -> None:
        """How far n slots' values lie from their weighted mean: float32 [layers, kv_heads, n], as weights."""
        s = self.shape
        grid = s.kv_heads, s.layers
        self.device.launch(
            self._kernels["value_spread"], grid, 256, pool, table, weights, to, s.layers, s.kv_heads, n
        )


def stretches_for(slots: int) -> int:
    """A power of two of stretches that covers them: few sizes of graph, as a conversation grows."""
    return 1 << max(2, (-(-slots // STRETCH) - 1).bit_length())


__all__ = ["MAX_HEAD", "SLOTS", "STRETCH", "Attention", "Call", "Shape", "stretches_for"]
