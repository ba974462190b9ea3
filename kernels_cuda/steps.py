"""Steps of a program: inputs in, launches or a graph of them, results out.

A step of up to 16 rows is a CUDA graph: one copy in, one call, one copy out. A graph is made for each size of
step, the second time that it occurs: by then every kernel has been loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from tinychat.kernels_cuda import head
from tinychat.kernels_cuda.driver import Graph, Memory, OutOfMemoryError
from tinychat.kernels_cuda.inputs import GRAPH_ROWS, Size
from tinychat.kernels_cuda.program import Program, Stage

ROW_INPUTS = 32  # numbers that a row of a large step is told in: more is made room for when it comes
GRAPHS = 64  # kept, where there is room; the one that waited longest goes first


class Steps:
    """Runs a program that is built. Its pools are to be resized here."""

    def __init__(self, program: Program):
        self.program, self.pools, self.device = program, program.pools, program.device
        self.graphs: OrderedDict[Size, list[Graph | None] | None] = OrderedDict()  # of each stage
        self.count = 0  # so far
        self.most = GRAPHS  # graphs that there is room for

    def resize(self, memory: int, n_blocks: int) -> None:
        """A pool of so many blocks; if it grows, what it held stays."""
        self.graphs.clear()  # they have the addresses in them
        others = sum(p.n_blocks for i, p in enumerate(self.pools) if i != memory)
        self.program.inputs.room(self.program.max_rows * ROW_INPUTS + others + n_blocks)
        self.pools[memory].resize(n_blocks)

    def table(self, block_table: np.ndarray) -> Memory:
        """A block table on the device, for what happens between steps."""
        memory, moved = self.program.inputs.put_table(block_table)
        if moved:
            self.graphs.clear()
        return memory

    def run(
        self,
        memories: list[list[Any]],
        ids: np.ndarray,
        positions: list[int],
        asked: list[int],
        wanted: str,
        out: np.ndarray,
        inverse_temperature: float = 0.0,
    ) -> None:
        """One step. Fills `out` [asked rows, head.columns] with what is wanted of their logits, and adds to
        scores.

        memories: of each, the sequences that the rows belong to, as it has them. ids, positions: [rows].
        asked: rows that get logits, ascending. inverse_temperature: of head.TOP's totals.
        """
        self.count += 1
        inputs, output, tail = self.program.inputs, self.program.output, len(asked)
        size = inputs.size(memories, asked, wanted)
        if inputs.reserve(size, memories):
            self.graphs.clear()
        watched = [x for x in zip(self.pools, size.extents, memories, strict=True) if x[1].watches]
        for pool, extent, sequences in watched:
            if pool.reserve_scores(extent, sequences):
                self.graphs.clear()  # they know where the old ones were
            pool.put_scores(extent, sequences)
        inputs.put(size, memories, ids, positions, asked, inverse_temperature)
        if size.rows <= GRAPH_ROWS:
            self._replay(size)
            if tail:
                output.fetch(wanted, out)
        else:
            for stage in self.program.stages:
                stage.launch(size)
            for first in range(0, tail, head.ROWS):
                part = out[first : first + head.ROWS]
                self._launch_head(size, first, len(part))
                output.fetch(wanted, part)
        for pool, extent, sequences in watched:
            pool.fetch_scores(extent, sequences)
        self.device.synchronize()

    def logits(self, row: int) -> np.ndarray:
        """The logits of one of the last step's asked rows, whatever was wanted of them: float32 [vocab]."""
        return self.program.output.logits(row)

    def _replay(self, size: Size) -> None:
        stages, graphs, done = self._stages(size), self.graphs, 0
        try:
            if graphs.get(size) is None and size in graphs and self.most:
                graphs[size] = [None if s.by_host else self._captured(s, size) for s in stages]
            found = graphs.get(size)
            for stage, graph in zip(stages, found or (), strict=False):
                if graph is None:
                    stage.launch(size)
                else:
                    graph.replay()
                done += 1
        except OutOfMemoryError:
            # What graphs hold may be needed elsewhere; from now on there are fewer of them.
            self.most = max(0, sum(g is not None for g in graphs.values()) - 1)
            graphs.clear()
            found = None
        for stage in stages[done:]:
            stage.launch(size)
        graphs[size] = found
        graphs.move_to_end(size)
        if len(graphs) > max(1, self.most):
            graphs.popitem(last=False)

    def _captured(self, stage: Stage, size: Size) -> Graph:
        return self.device.capture(lambda: stage.launch(size))

    def _stages(self, size: Size) -> list[Stage]:
        """Stages of a step of that size, with its head."""
        *before, last = self.program.stages
        if not size.tail:
            return [*before, last]

        def whole(size: Size) -> None:
            last.launch(size)
            self._launch_head(size, 0, size.tail)

        return [*before, Stage(whole)]

    def _launch_head(self, size: Size, first: int, n: int) -> None:
        inputs, output = self.program.inputs, self.program.output
        if size.first < 0:
            x = output.pick(inputs.asked(size)[4 * first :], n)
        else:
            x = output.row(size.first + first)
        output.launch(x, size.wanted, inputs.inverse_temperatures(size)[4 * first :], n)
