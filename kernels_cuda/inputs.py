"""Inputs of a step about its rows and sequences: how they lie in device memory (src/step.cuh), and how it
gets there, in one copy.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from tinychat.kernels_cuda import head
from tinychat.kernels_cuda.attention import QUERIES, stretches_for
from tinychat.kernels_cuda.driver import Device, Memory

GRAPH_ROWS = 16  # up to which a step is a graph
FEW_ROWS = 32  # attention of more rows of a sequence has enough to do without spreading the context

PLACE, PIECE, WATCH = 2, 5, 7  # numbers in each of src/step.cuh's


@dataclass(eq=False)
class Sequence:
    """Consecutive rows of a step, as one memory has them.

    row, rows   which of the step
    length      slots that are there before them
    table       int32, its blocks, but for the first `skipped`, which are not read
    scores      float32 [watched or 1, layers, kv_heads, slots], added to; of the last `watched` rows
    """

    row: int
    rows: int
    length: int
    table: np.ndarray
    skipped: int = 0
    scores: np.ndarray | None = None
    watched: int = 0

    @property
    def apart(self) -> bool:
        """Whether each watched row has scores of its own."""
        return self.scores is not None and len(self.scores) == self.watched

    @property
    def planes(self) -> int:
        """Rows of `scores`, 0 where nobody watches."""
        return len(self.scores) if self.scores is not None and self.watched else 0


@dataclass(eq=False)
class Passing:
    """Consecutive rows of a step, as a memory of states has them.

    row, rows   which of the step
    source      the state before them; -1: zeros
    kept        int32 [rows]: the states that those behind them go to, or -1
    """

    row: int
    rows: int
    source: int
    kept: np.ndarray
    table = np.empty(0, np.int32)  # as a `Sequence` has it
    planes = 0


class Extent(NamedTuple):
    """Numbers of one memory that launches depend on.

    stretches  that cover the longest sequence
    pieces     of 16 queries (src/step.cuh); few: those of the step's `few` rows
    watches    sequences whose attention is scored
    """

    stretches: int
    pieces: int
    few: int
    watches: int = 0


class Size(NamedTuple):
    """Numbers that a step's launches depend on. Which sequences its rows belong to is not part of it.

    tail    rows that get logits
    first   the first of them, where they lie one behind the other; else -1
    few     first rows of the step that belong to sequences of few rows: their attention is spread
    wanted  of the logits: head.LOGITS, ARGMAX or TOP
    """

    rows: int
    tail: int = 0
    first: int = 0
    few: int = 0
    wanted: str = head.LOGITS
    extents: tuple[Extent, ...] = ()


@lru_cache(256)
def offsets(size: Size) -> list[int]:
    """Offsets of the inputs' parts, in numbers of 4 bytes: ids, inverse temperatures, positions,
    asked rows; places, pieces and watches of each memory; tables.
    """
    counts = [size.rows, size.tail, size.rows, size.tail]
    for e in size.extents:
        counts += [PLACE * size.rows, PIECE * e.pieces, WATCH * e.watches]
    return list(accumulate(counts, initial=0))


class Inputs:
    """Buffers of a step's inputs: on the device, and pinned on the host."""

    def __init__(self, device: Device, groups: list[int]):
        """groups: query heads of a KV head, in each memory; 0: it is one of states."""
        self._device, self._groups = device, groups
        self._memory, self._host = device.allocate(0), np.empty(0, np.int32)

    def size(self, memories: list[list[Any]], asked: list[int], wanted: str) -> Size:
        """Size of a step whose rows belong to these sequences, the same in each memory. asked: rows that get
        logits, ascending.
        """
        last = memories[0][-1]
        rows, tail, few = last.row + last.rows, len(asked), 0
        for s in memories[0]:
            if s.rows > FEW_ROWS:
                break
            few += s.rows
        first = asked[0] if tail else 0
        together = not tail or asked[-1] - first < tail
        extents = tuple([_extent(m, group, few) for m, group in zip(memories, self._groups, strict=True)])
        return Size(rows, tail, first if together else -1, few, wanted, extents)

    def reserve(self, size: Size, memories: list[list[Any]]) -> bool:
        """Make room for a step; whether everything lies elsewhere now."""
        return self.room(offsets(size)[-1] + sum([len(s.table) for m in memories for s in m]))

    def room(self, numbers: int) -> bool:
        """Have room for as many of 4 bytes; whether everything lies elsewhere now."""
        if numbers <= len(self._host):
            return False
        numbers += numbers // 2
        memory, host = self._device.allocate(4 * numbers), self._device.pinned((numbers,), np.int32)
        self._memory, self._host = memory, host
        return True

    def put(
        self,
        size: Size,
        memories: list[list[Any]],
        ids: np.ndarray,
        positions: list[int],
        asked: list[int],
        inverse_temperature: float,
    ) -> None:
        """Write a step's inputs, and copy them. There has to be room."""
        host, at = self._written(), offsets(size)
        host[: at[1]] = ids
        if size.wanted == head.TOP:
            host[at[1] : at[2]].view(np.float32)[:] = inverse_temperature
        numbers, begin = positions + asked, 0
        tables: list[np.ndarray] = []
        for sequences, extent, group in zip(memories, size.extents, self._groups, strict=True):
            numbers += _facts(sequences, group, PIECE * extent.pieces, begin)
            tables += [s.table for s in sequences]
            begin += sum(len(s.table) for s in sequences)
        host[at[2] : at[-1]] = np.frombuffer(array("i", numbers), np.int32)
        end = at[-1]
        for table in tables:
            host[end : end + len(table)] = table
            end += len(table)
        self._device.upload(self._memory, host[:end])

    def put_table(self, table: np.ndarray) -> tuple[Memory, bool]:
        """A block table alone, for what happens between steps; whether everything lies elsewhere now."""
        moved = self.room(len(table))
        self._written()[: len(table)] = table
        self._device.upload(self._memory, self._host[: len(table)])
        return self._memory, moved

    def _written(self) -> np.ndarray:
        """The host's buffer, when no copy reads it any more: after a step that failed, one still may."""
        if self._device.busy:
            self._device.synchronize()
        return self._host

    def ids(self, size: Size) -> Memory:
        """int32 [rows]."""
        return self._part(size, 0)

    def positions(self, size: Size) -> Memory:
        """int32 [rows]."""
        return self._part(size, 2)

    def inverse_temperatures(self, size: Size) -> Memory:
        """float32 [rows with logits], written where head.TOP is wanted."""
        return self._part(size, 1)

    def asked(self, size: Size) -> Memory:
        """int32 [rows with logits]: which rows these are."""
        return self._part(size, 3)

    def facts(self, size: Size, memory: int) -> dict[str, Memory]:
        """Places, pieces and watches of one memory, and all tables (src/step.cuh)."""
        facts = {
            name: self._part(size, 4 + 3 * memory + i)
            for i, name in enumerate(("places", "pieces", "watches"))
        }
        return {**facts, "tables": self._part(size, -1)}

    def _part(self, size: Size, index: int) -> Memory:
        return self._memory[4 * offsets(size)[index] :]


def pieces_of(rows: int, group: int) -> int:
    """Pieces that a sequence of so many rows is attended in."""
    return -(-rows * group // QUERIES)


def _facts(sequences: list[Any], group: int, room: int, begin: int) -> list[int]:
    """Places, pieces (as many numbers as `room` says) and watches of one memory, whose tables begin at
    `begin`; of a memory of states, passes in place of these.
    """
    places: list[int] = []
    if not group:
        for s in sequences:
            for i, kept in enumerate(s.kept.tolist()):
                places += -1 - i if i else s.source, kept
        return places
    pieces: list[int] = []
    watches: list[int] = []
    plane = 0
    for s in sequences:
        own = s.row, s.rows, s.length, begin - s.skipped
        for slot in range(s.length, s.length + s.rows):
            places += slot, own[3]
        for query in range(0, s.rows * group, QUERIES):
            pieces += *own, query
        if s.planes:
            watches += *own, s.watched, plane, s.apart
            plane += s.planes
        begin += len(s.table)
    pieces += [0] * (room - len(pieces))
    return places + pieces + watches


def _extent(sequences: list[Any], group: int, few: int) -> Extent:
    """Extent that a graph is made for: of several sequences, it has room for any that its rows may belong to;
    of a single one, for no more than that.
    """
    if not group:
        return Extent(0, 0, 0)
    if len(sequences) == 1:
        (s,) = sequences
        n = pieces_of(s.rows, group)
        return Extent(stretches_for(s.length + s.rows), n, n if few else 0, 1 if s.planes else 0)
    stretches = stretches_for(max(s.length + s.rows for s in sequences))
    watches = sum(s.planes > 0 for s in sequences)
    rows = sequences[-1].row + sequences[-1].rows
    if rows <= GRAPH_ROWS:
        n = rows * pieces_of(1, group)
        return Extent(stretches, n, n, watches)
    pieces = [pieces_of(s.rows, group) for s in sequences]
    at_first = sum(n for n, s in zip(pieces, sequences, strict=True) if s.row < few)
    return Extent(stretches, sum(pieces), at_first, watches)
