"""Random schedules of several sequences in one backend: those of a round in one step, or in one each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tinychat.backends.interface import BLOCK, STRETCH, Slots, Span, States, Step, Tails

BLOCKS = 96
LENGTH = 300  # tokens of the longest sequence: more than one part of the attention kernels


def poison(backend, blocks: np.ndarray, memory: int) -> None:
    """Fill blocks with NaN, in 8 bits as well: whoever reads them, shows it."""
    shape = len(blocks), backend.kv_bytes_per_block(memory)
    backend.write_blocks(blocks, np.full(shape, 0xFF, np.uint8), memory)


@dataclass
class Sequence:
    """Its ids, how far it has come, and its blocks in each KV memory, which lie among those of the others."""

    ids: np.ndarray
    tables: list[np.ndarray]
    at: int = 0
    scores: list[np.ndarray] = field(default_factory=list)

    def span(self, backend, rows: int, logits_from: int, scored_rows: int) -> Span:
        """The next rows; scores of the paged memories, if any rows are scored."""
        memories = []
        for m, (spec, table) in enumerate(zip(backend.memories, self.tables, strict=True)):
            if spec.kind == "tail":
                memories.append(Tails(self.exact(table, rows)))
                continue
            if spec.kind == "state":
                kept = np.full(rows, -1, np.int32)
                kept[-1] = table[(self.at + rows) % len(table)]
                memories.append(States(int(table[self.at % len(table)]) if self.at else -1, kept))
                continue
            seen = table.copy()
            if spec.kind == "window":  # what lies behind the window is never read
                behind = max(0, self.at + 1 - spec.window) // BLOCK
                poison(backend, table[:behind], m)
                seen[:behind] = -1
            scores = None
            if scored_rows and spec.kind == "paged":
                scores = np.zeros((scored_rows, *backend.kv_heads(m), self.at + rows), np.float32)
                self.scores.append(scores)
            memories.append(Slots(seen, self.at, scores, scored_rows))
        ids = self.ids[self.at : self.at + rows]
        return Span(ids, self.at + 7, logits_from, tuple(memories))  # as after an eviction of seven tokens

    def exact(self, table: np.ndarray, rows: int) -> np.ndarray:
        """Blocks of a tail: of stretches that are whole behind this step and were not begun before, every
        second one is not left anywhere, and those long before are in nobody's reach.
        """
        end = self.at + rows
        blocks = table[: -(-end // BLOCK)].copy()
        stretch = np.arange(len(blocks)) * BLOCK // STRETCH
        whole = (stretch * STRETCH >= self.at) & ((stretch + 1) * STRETCH <= end)
        past = (stretch + 1) * STRETCH <= self.at
        blocks[(stretch > 0) & (past | (whole & (stretch % 2 > 0)))] = -1
        return blocks


def sequences(backend, rng: np.random.Generator, n: int) -> list[Sequence]:
    """n sequences whose blocks share the pools of each memory."""
    each = BLOCKS // n
    pools = [
        np.random.default_rng(m).permutation(BLOCKS).astype(np.int32) for m in range(len(backend.memories))
    ]
    length = min(LENGTH, each * BLOCK)
    return [
        Sequence(
            rng.integers(0, backend.cfg.vocab_size, length).astype(np.int32),
            [pool[i * each : (i + 1) * each] for pool in pools],
        )
        for i in range(n)
    ]


def rounds(rng: np.random.Generator, n: int, length: int, most: int) -> list[list[tuple[int, int, int, int]]]:
    """Steps of (sequence, rows, logits_from, scored rows): decode rows beside chunks of prompts, joining and
    leaving as they come, until `most` steps were made.
    """
    at, steps = [0] * n, []
    for _ in range(most):
        step = []
        for i in rng.permutation(n)[: rng.integers(1, n + 1)].tolist():
            rows = int(rng.choice([1, 1, 1, 2, 5, 17, 40, 130]))
            if at[i] + rows > length:
                continue
            at[i] += rows
            step.append((i, rows, int(rng.integers(0, rows + 1)), int(rng.integers(0, min(rows, 20) + 1))))
        if step:
            steps.append(step)
    return steps


def run(backend, rng_seed: int, n: int, together: bool, greedy: bool = False, most: int = 12):
    """What the sequences get of a schedule: for each the list of its logits (or ids) and scores."""
    rng = np.random.default_rng(rng_seed)
    these = sequences(backend, rng, n)
    got: list[list[np.ndarray]] = [[] for _ in these]
    take = backend.step_greedy if greedy else backend.step
    for step in rounds(rng, n, len(these[0].ids), most):
        spans = [these[i].span(backend, rows, start, scored) for i, rows, start, scored in step]
        if together:
            out = take(Step(tuple(spans)))
        else:
            out = np.concatenate([take(Step((span,))) for span in spans])
        at = 0
        for i, rows, start, _ in step:
            got[i].append(out[at : at + rows - start])
            these[i].at += rows
            at += rows - start
        assert at == len(out)
    return got, [s.scores for s in these]


def assert_same(one, other, **tolerance) -> None:
    """Bit for bit, or within a tolerance."""
    assert sum(len(rows) for got in one[0] for rows in got) > 20
    for mine, theirs in zip(one[0] + one[1], other[0] + other[1], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, **tolerance) if tolerance else np.testing.assert_array_equal(
                a, b
            )
