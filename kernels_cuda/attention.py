"""The KV cache and attention on the device: layout, launches, and how a few rows spread over the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.linear import row_length
from tinychat.kernels_cuda.modules import Modules

SLOTS = 16  # in a block
SPAN = 64  # slots that attention takes at once
QUERIES = 16  # of a warp
MAX_HEAD = 256


@dataclass(frozen=True)
class Shape:
    """Attention of a model. size: channels of a head; bits: of the cache; scale: of scores; cap 0: none."""

    layers: int
    heads: int
    kv_heads: int
    size: int
    bits: int
    scale: float
    cap: float = 0.0

    @property
    def defines(self) -> dict[str, str]:
        """What cache.cu and attention.cu are compiled with."""
        return {"HEAD": str(self.head), "KV_BITS": str(self.bits)}

    @property
    def head(self) -> int:
        """Channels with padding."""
        return -(-self.size // 32) * 32

    @property
    def block_bytes(self) -> int:
        """Of 16 slots, all layers: `src/cache.cuh` says how they lie."""
        scales = SLOTS * (self.head // 32) * 2 if self.bits == 8 else 0
        return self.layers * self.kv_heads * 2 * (SLOTS * self.head * self.bits // 8 + scales)

    @property
    def query_bytes(self) -> int:
        """Of a row's queries."""
        return self.heads * self.head * 2


@dataclass(frozen=True)
class Call:
    """Attention of one layer in one step: what all its launches are told.

    totals: float32 pairs [rows, heads], of every row's softmax; window: slots that a row sees, 0: all
    """

    step: Memory
    q: Memory
    pool: Memory
    blocks: Memory
    totals: Memory
    layer: int
    rows: int
    window: int


class Attention:
    """Launches for one model's shape."""

    def __init__(self, modules: Modules, shape: Shape, workspace: int):
        """workspace: bytes for spans of rows that are not yet merged; what does not fit goes in turns."""
        self.shape, self.device = shape, modules.device
        for source, names in (
            ("cache.cu", ("rope_table", "rope_append", "move_slots", "turn_keys", "value_spread")),
            ("attention.cu", ("attend_spans", "merge_spans", "attend_rows", "score_slots")),
        ):
            for name in names:
                setattr(self, "_" + name, modules.kernel(source, name, shape.defines))
        self._stats_and_parts = self.device.allocate(workspace)

    def row_bytes(self, spans: int) -> int:
        """Workspace that a row takes when it is spread over so many spans."""
        return self.shape.heads * spans * (8 + 4 * self.shape.head)

    def turns(
        self, step: Memory, frequencies: Memory, table: Memory, rows: int, pairs: int, magnitude: float
    ):
        """cos and sin of the rows' angles: float32 [rows, pairs, 2]. frequencies: float64 [pairs]."""
        self.device.launch(self._rope_table, (rows,), 128, step, frequencies, table, pairs, float(magnitude))

    def append(self, c: Call, qkv: Memory, table: Memory | None, pairs: int) -> None:
        """Turn queries and keys by `table` (pairs 0: not at all), write keys and values to the cache."""
        s = self.shape
        self.device.launch(
            self._rope_append, (c.rows, s.heads + 2 * s.kv_heads), 32,
            c.step, qkv, table, c.q, c.pool, c.blocks, c.layer, s.layers, s.heads, s.kv_heads, s.size, pairs,
        )  # fmt: skip

    def spread(self, c: Call, to: Memory, spans: int) -> None:
        """For few rows: `spans` (enough for all that is cached) at once, then merged."""
        s = self.shape
        at_once = min(c.rows, self._stats_and_parts.size // self.row_bytes(spans))
        if not at_once:
            return self.walk(c, to)
        stats = self._stats_and_parts
        parts = stats[at_once * s.heads * spans * 8 :]
        for row in range(0, c.rows, at_once):
            n = min(at_once, c.rows - row)
            tiles = -(-n * (s.heads // s.kv_heads) // QUERIES)
            self.device.launch(
                self._attend_spans, (-(-spans // 4), s.kv_heads, tiles), 128,
                c.step, c.q, c.pool, c.blocks, stats, parts, c.layer, s.layers, row, n, s.heads, s.kv_heads,
                spans, c.window, float(s.scale), float(s.cap),
            )  # fmt: skip
            self.device.launch(
                self._merge_spans, (n, s.heads), s.head,
                c.step, stats, parts, c.totals, to, row, s.heads, spans, c.window, s.size,
                row_length(s.heads * s.size),
            )  # fmt: skip

    def walk(self, c: Call, to: Memory) -> None:
        """For many rows: the same numbers, bit by bit."""
        s = self.shape
        warps = 4 if s.head <= 128 else 2
        grid = -(-c.rows * (s.heads // s.kv_heads) // (QUERIES * warps)), s.kv_heads
        self.device.launch(
            self._attend_rows, grid, warps * 32,
            c.step, c.q, c.pool, c.blocks, c.totals, to, c.layer, s.layers, c.rows, s.heads, s.kv_heads,
            c.window, float(s.scale), float(s.cap), s.size, row_length(s.heads * s.size),
        )  # fmt: skip

    def score(self, c: Call, scores: Memory, watched: int, apart: bool, slots: int) -> None:
        """The probability that each slot got from the last `watched` rows, after their attention."""
        s = self.shape
        self.device.launch(
            self._score_slots, (-(-slots // SLOTS), s.kv_heads), 32,
            c.step, c.q, c.pool, c.blocks, c.totals, scores, c.layer, s.layers, c.rows, watched, int(apart),
            s.heads, s.kv_heads, slots, c.window, float(s.scale), float(s.cap),
        )  # fmt: skip

    def move(self, pool: Memory, blocks: Memory, src: Memory, dst: Memory, n: int) -> None:
        """Slots src over slots dst: int32 [layers, kv_heads, n]."""
        s = self.shape
        grid = n, s.kv_heads, s.layers
        self.device.launch(self._move_slots, grid, 128, pool, blocks, src, dst, s.layers, s.kv_heads, n)

    def turn(
        self, pool: Memory, blocks: Memory, delta: Memory, frequencies: Memory, n: int, pairs: int
    ) -> None:
        """Keys of the first n slots by delta positions: int32 [layers, kv_heads, n]."""
        s = self.shape
        self.device.launch(
            self._turn_keys, (n, s.kv_heads, s.layers), 32,
            pool, blocks, delta, frequencies, s.layers, s.kv_heads, n, pairs,
        )  # fmt: skip

    def value_spread(self, pool: Memory, blocks: Memory, weights: Memory, to: Memory, n: int) -> None:
        """How far n slots' values lie from their weighted mean: float32 [layers, kv_heads, n], as weights."""
        s = self.shape
        grid = s.kv_heads, s.layers
        self.device.launch(self._value_spread, grid, 256, pool, blocks, weights, to, s.layers, s.kv_heads, n)


__all__ = ["MAX_HEAD", "SLOTS", "SPAN", "Attention", "Call", "Shape"]
