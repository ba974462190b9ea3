"""Steps of several sequences, models of several memories: every span has the bits that it has alone, and in
one memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import span_schedules
from backend_steps import IDS, cuda, truth
from emulation import bench, controls, needs_device, needs_emulation
from families import relative_error
from tiny import TinyCheckpoint

from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import BLOCK, LARGEST_ROWS, MemorySpec, Slots, Span, Step
from tinychat.kernels_cuda import head
from tinychat.network.config import RopeConfig

pytestmark = needs_device

LAYERS = 3
WINDOWED = dict(
    n_layers=LAYERS, window=21, windowed_layers=(0, 2), local_rope=RopeConfig(theta=500.0, dim=16)
)
BLOCKS = 60


def together(cfg) -> tuple[MemorySpec, ...]:
    """One memory for all layers, whatever they see."""
    return (MemorySpec("paged", tuple(range(cfg.n_layers)), 2, 16),)


def backend(monkeypatch, several=False, **changes) -> CudaBackend:
    """A model with one memory, or with one for its windowed layers too."""
    with monkeypatch.context() as m:
        if not several:
            m.setattr("tinychat.backends.cuda.memories_of", together)
        b = CudaBackend(TinyCheckpoint(5, context_length=512, **changes), modules=bench().modules)
    for memory in range(len(b.memories)):
        b.allocate_kv(BLOCKS, memory)
    return b


@dataclass
class Conversation:
    """A sequence: its ids, blocks of its own in each memory, and how many of its tokens are there."""

    ids: np.ndarray
    tables: list[np.ndarray]
    position: int = 0  # what the rotary position is ahead of the slot
    length: int = 0
    rows: list[np.ndarray] = field(default_factory=list)

    def span(self, b: CudaBackend, n: int, logits_from: int, scores=None, scored_rows: int = 0) -> Span:
        """The next n tokens. Of a window's table, what lies behind it says nothing."""
        slots = []
        for spec, table in zip(b.memories, self.tables, strict=False):
            if spec.kind == "window":
                table = table.copy()
                table[: max(0, self.length + 1 - spec.window) // BLOCK] = -1
            slots.append(Slots(table, self.length, scores, scored_rows))
            scores = None
        at = self.length
        return Span(self.ids[at : at + n], at + self.position, logits_from, tuple(slots))


def conversations(n: int) -> list[Conversation]:
    """Of all lengths, their blocks scattered over the pools; each has others in each memory."""
    rng, each = np.random.default_rng(n), BLOCKS // n
    tables = [rng.permutation(BLOCKS).astype(np.int32).reshape(-1, each) for _ in range(2)]
    return [
        Conversation(np.roll(IDS, -17 * i), [tables[0][i], tables[1][i]], position=1000 * i) for i in range(n)
    ]


# Rows of each conversation in each step, and how many of them get no logits: short ones beside long ones, in
# graphs and not, in all orders.
SCHEDULE = [
    [(70, 70), (0, 0), (3, 2)],
    [(1, 0), (50, 49), (0, 0)],
    [(1, 0), (1, 0), (1, 0)],
    [(1, 0), (5, 1), (1, 0)],
    [(1, 1), (5, 0), (2, 0)],
    [(1, 0), (1, 0), (1, 0)],
    [(1, 0), (0, 0), (80, 3)],
    [(40, 39), (1, 0), (9, 9)],
    [(1, 0), (1, 0), (1, 0)],
    [(1, 0), (1, 0), (1, 0)],
]


def told_together(b: CudaBackend) -> list[np.ndarray]:
    """Logits of each conversation's asked rows."""
    all_ = conversations(3)
    for parts in SCHEDULE:
        spans = [(c, c.span(b, n, free)) for c, (n, free) in zip(all_, parts, strict=True) if n]
        logits, at = b.step(Step(tuple(s for _, s in spans))), 0
        for c, span in spans:
            n = len(span.token_ids)
            c.rows.append(logits[at : at + n - span.logits_from])
            at, c.length = at + n - span.logits_from, c.length + n
        assert at == len(logits)
    return [np.concatenate(c.rows) for c in all_]


def told_alone(b: CudaBackend) -> list[np.ndarray]:
    """The same, a conversation after the other."""
    out = []
    for i, c in enumerate(conversations(3)):
        for parts in SCHEDULE:
            n, free = parts[i]
            if n:
                c.rows.append(b.step(Step((c.span(b, n, free),))))
                c.length += n
        out.append(np.concatenate(c.rows))
    return out


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_conversations_in_one_step_have_the_bits_that_they_have_alone(kv_bits):
    checkpoint = TinyCheckpoint(5, context_length=512)
    b = CudaBackend(checkpoint, modules=bench().modules, kv_bits=kv_bits)
    b.allocate_kv(BLOCKS)
    expected = told_alone(b)
    if kv_bits == 16:  # an 8-bit cache has a test of its own
        reference = truth(checkpoint)
        reference.allocate_kv(BLOCKS)
        assert relative_error(np.concatenate(expected), np.concatenate(told_alone(reference))) < 5e-3
    b.allocate_kv(BLOCKS)  # nothing of it is left
    assert_same(told_together(b), expected)


def test_a_window_with_a_memory_of_its_own_changes_no_bit(monkeypatch):
    expected = told_alone(backend(monkeypatch, **WINDOWED))
    assert_same(told_together(backend(monkeypatch, **WINDOWED)), expected)
    b = backend(monkeypatch, several=True, **WINDOWED)
    assert [b.kv_heads(m) for m in range(2)] == [(1, 2), (2, 2)]
    assert b.kv_bytes_per_block(1) == 2 * b.kv_bytes_per_block(0)
    assert_same(told_together(b), expected)


@pytest.mark.parametrize("rows", [1, 20])
def test_what_lies_behind_a_window_is_not_read(monkeypatch, rows):
    """Its blocks are made to be no numbers, its entries to name no block."""
    steps = [(70, 70), (rows, 0), (1, 0), (16, 0), (1, 0)]
    logits = []
    for several in (False, True):
        b, (c, *_) = backend(monkeypatch, several=several, **WINDOWED), conversations(2)
        for n, free in steps:
            if several:
                behind = c.tables[1][: max(0, c.length + 1 - b.memories[1].window) // BLOCK]
                b.write_blocks(behind, np.full((len(behind), b.kv_bytes_per_block(1)), 0xFF, np.uint8), 1)
            c.rows.append(b.step(Step((c.span(b, n, free),))))
            c.length += n
        assert not several or len(behind) >= 4
        logits.append(np.concatenate(c.rows))
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(logits[1], logits[0])


def test_blocks_are_saved_copied_turned_and_moved_in_the_memory_that_is_named(monkeypatch):
    """What is done to both memories is what is done to the one that has all layers."""
    logits = []
    for several in (False, True):
        b, (c, other) = backend(monkeypatch, several=several, **WINDOWED), conversations(2)
        b.step(Step((c.span(b, 60, 60),)))
        c.length = 60
        for m in range(len(b.memories)):
            n, (layers, heads) = 48, b.kv_heads(m)
            table, own = c.tables[m], other.tables[m]
            src, dst = np.full((layers, heads, 4), -1, np.int32), np.zeros((layers, heads, 4), np.int32)
            src[:, 1], dst[:, 1] = [50, 51, 52, 53], [44, 47, 46, 45]
            b.move_slots(table, src, dst, m)
            table = table.copy()
            if several and m:
                table[1] = -1  # a window has left it behind
            b.turn_keys(table, np.full((layers, heads, n), -7, np.int32), m)
            b.write_blocks(own[:3], b.read_blocks(c.tables[m][:3], m), m)
            b.copy_block(int(c.tables[m][3]), int(own[3]), m)
        other.ids, other.length, other.position = c.ids, 60, -7
        logits.append(b.step(Step((other.span(b, 2, 0), c.span(b, 1, 0)))))
        spread = b.value_spread(c.tables[0], np.ones((*b.kv_heads(0), 40), np.float32), 0)
        logits.append(spread if several else spread[1:2])
    np.testing.assert_array_equal(logits[2], logits[0])
    np.testing.assert_array_equal(logits[3], logits[1])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, WINDOWED])
def test_random_schedules_of_conversations_have_the_bits_of_each_alone(n, changes):
    results = []
    for together in (False, True):
        b = cuda(TinyCheckpoint(1, context_length=512, **changes), kv_bits=8)
        for memory in range(len(b.memories)):
            b.allocate_kv(span_schedules.BLOCKS, memory)
        results.append(span_schedules.run(b, 10 + n, n, together, most=8))
    span_schedules.assert_same(*results)


def watching(b, c, n, logits_from=0, watched=0, apart=True):
    scores = np.full((watched if apart else 1, *b.kv_heads(), 200), 0.25, np.float32) if watched else None
    return c.span(b, n, logits_from, scores, watched), scores


@pytest.mark.parametrize("rows", [(5, 3, 4), (5, 3, 40)])
def test_each_span_is_scored_as_it_asks(rows):
    asks = [(rows[0], True), (0, False), (rows[2] - 1, False)]
    got = []
    for together in (False, True):
        b, all_ = cuda(TinyCheckpoint(5, context_length=512)), conversations(3)
        b.allocate_kv(BLOCKS)
        for c, n in zip(all_, (30, 90, 17), strict=True):
            b.step(Step((c.span(b, n, n),)))
            c.length = n
        for _ in range(3):  # run, captured, replayed
            spans = [watching(b, c, n, 0, *ask) for c, n, ask in zip(all_, rows, asks, strict=True)]
            if together:
                b.step(Step(tuple(span for span, _ in spans)))
            else:
                for span, _ in spans:
                    b.step(Step((span,)))
            got.append([scores for _, scores in spans if scores is not None])
    for alone, beside in zip(got[:3], got[3:], strict=True):
        assert_same(beside, alone)
    assert got[0][0].sum() - 0.25 * got[0][0].size == pytest.approx(rows[0] * 2 * 4, rel=1e-3)


def test_a_graph_serves_whatever_conversations_its_rows_belong_to():
    b, all_ = cuda(TinyCheckpoint(5, context_length=512)), conversations(4)
    b.allocate_kv(BLOCKS)
    for c in all_:
        b.step(Step((c.span(b, 20, 20),)))
        c.length = 20
    for parts in ([2, 2, 1, 1], [3, 1, 1, 1], [1, 0, 4, 1], [0, 5, 0, 1], [1, 2, 0, 3]):
        spans = [c.span(b, n, 0) for c, n in zip(all_, parts, strict=True) if n]
        expected = [b.step(Step((span,))) for span in spans]
        np.testing.assert_array_equal(b.step(Step(tuple(spans))), np.concatenate(expected))
    together = [size for size in b._steps.graphs if size.rows == 6]
    assert len(together) == 1


@needs_emulation
def test_several_conversations_cost_as_many_launches_and_copies_as_one(monkeypatch):
    b, all_ = cuda(TinyCheckpoint(5)), conversations(4)
    b.allocate_kv(BLOCKS)
    uploads = []
    inner = b._device.upload
    monkeypatch.setattr(b._device, "upload", lambda to, a: uploads.append(a.nbytes) or inner(to, a))
    costs = []
    for spans in ([all_[0].span(b, 4, 0)], [c.span(b, 1, 0) for c in all_]):
        before = controls().fake_launches()
        b.step(Step(tuple(spans)))
        costs.append((controls().fake_launches() - before, len(uploads)))
        uploads.clear()
    assert costs[0] == costs[1]
    assert costs[0][1] == 1


def test_the_largest_logits_and_the_best_ids_of_several_conversations():
    b, all_ = cuda(TinyCheckpoint(4)), conversations(3)
    b.allocate_kv(BLOCKS)
    spans = [c.span(b, n, free) for c, n, free in zip(all_, (1, 6, 2), (0, 4, 1), strict=True)]
    expected = b.step(Step(tuple(spans)))
    assert len(expected) == 4
    np.testing.assert_array_equal(b.step_greedy(Step(tuple(spans))), expected.argmax(axis=1))
    got = b.step_largest(Step(tuple(spans)), 0.8)
    for row, largest in zip(expected, got, strict=True):
        np.testing.assert_array_equal(largest.values, np.sort(row)[::-1][: head.LARGEST])
        np.testing.assert_array_equal(largest.whole(), row)
        x = row.astype(np.float64)
        assert largest.total == pytest.approx(np.exp((x - x.max()) / 0.8).sum(), rel=1e-5)
    assert head.ROWS == LARGEST_ROWS


def test_wrong_spans_are_errors(monkeypatch):
    b, (c, other) = backend(monkeypatch, several=True, **WINDOWED), conversations(2)
    good = c.span(b, 3, 0)
    with pytest.raises(ValueError, match="513"):
        b.step(Step((good, Span(np.zeros(510, np.int32), 0, 0, good.memories))))
    with pytest.raises(ValueError, match="rows"):
        b.step(Step((good, Span(np.zeros(0, np.int32), 0, 0, good.memories))))
    with pytest.raises(ValueError, match="rows"):
        b.step(Step(()))
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="logits"):
            b.step(Step((good, Span(IDS[:3], 0, wrong, good.memories))))
    with pytest.raises(ValueError, match="each memory"):
        b.step(Step((good, Span(IDS[:3], 0, 0, good.memories[:1]))))
    for scores, watched in ((np.zeros((2, 1, 2, 9), np.float32), 3), (np.zeros((4, 1, 2, 9), np.float32), 4)):
        with pytest.raises(ValueError, match="scored"):
            b.step(Step((good, other.span(b, 3, 0, scores, watched))))
    for memory in range(2):
        slots = list(other.span(b, 3, 0).memories)
        slots[memory] = Slots(np.full(4, -1, np.int32), 0)
        with pytest.raises(ValueError, match="not there"):
            b.step(Step((good, Span(IDS[:3], 0, 0, tuple(slots)))))
