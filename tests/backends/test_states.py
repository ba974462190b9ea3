"""Layers with a state: rows go through it one by one, however they are cut, and any row's may be kept."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import bench, needs_device
from memories import allocate, state_slot
from recurrent import RecurrentCheckpoint

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import Slots, Span, States, Step, memories_of
from tinychat.backends.reference import ReferenceBackend
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(3).integers(0, 258, 60).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)


@pytest.fixture(params=["lfm2", "qwen3_5", "granitemoehybrid"])
def family(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    return request.param


def on_gpu(checkpoint, policy, threads):
    return CudaBackend(checkpoint, policy, modules=bench().modules)


BACKENDS = [CpuBackend, ReferenceBackend, pytest.param(on_gpu, marks=needs_device)]


@pytest.fixture(params=BACKENDS, ids=["cpu", "reference", "cuda"])
def backend(request, family):
    checkpoint, policy = RecurrentCheckpoint(family), WeightPolicy("none", 16)
    return allocate(request.param(checkpoint, policy, threads=2), 20)


def state(b) -> int:
    """The memory of states."""
    return next(m for m, spec in enumerate(b.memories) if spec.kind == "state")


def span(b, start, end, source=None, kept=(), ids=IDS, table=TABLE):
    """kept: (token, slot) pairs of the sequence; the state behind the last token has its usual slot too."""
    slots = np.full(end - start, -1, np.int32)
    slots[-1] = state_slot(end)
    for token, slot in kept:
        slots[token - start] = slot
    has = States(state_slot(start) if source is None else source, slots)
    memories = [has if m == state(b) else Slots(table, start) for m in range(len(b.memories))]
    return Span(ids[start:end], start, 0, tuple(memories))


def equal(b, ours, theirs):
    if b.row_independent:
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def whole(b):
    return b.step(Step((span(b, 0, len(IDS), table=TABLE + 8),)))


def test_states_of_alike_layers_are_one_memory(family):
    cfg = RecurrentCheckpoint(family).config
    (spec,) = (m for m in memories_of(cfg) if m.kind == "state")
    mixers = [cfg.layers[i].mixer for i in spec.layers]
    assert spec.state_bytes == 4 * sum(m.state_size for m in mixers)
    assert len(mixers) == {"lfm2": 1, "qwen3_5": 2, "granitemoehybrid": 2}[family]


def test_rows_pass_one_by_one_however_they_are_cut(backend):
    expected = whole(backend)
    for cuts in ([1] * 60, [7, 1, 2, 33, 16, 1]):
        at, out = 0, []
        for n in cuts:
            out.append(backend.step(Step((span(backend, at, at + n),))))
            at += n
        equal(backend, np.concatenate(out), expected)


def test_a_draft_rolls_back_to_an_earlier_row(backend):
    b, expected, draft = backend, whole(backend), IDS.copy()
    b.step(Step((span(b, 0, 10, kept=[(9, 10)]),)))
    draft[12:14] = 0
    kept = [(10, 10), (11, 11), (12, 12), (13, 13)]  # the first is where the state before them is, too
    equal(b, b.step(Step((span(b, 10, 14, 10, kept, draft),)))[:2], expected[10:12])
    equal(b, b.step(Step((span(b, 12, 20, 11, ids=IDS),))), expected[12:20])
    equal(b, b.step(Step((span(b, 11, 20, 10, ids=IDS),))), expected[11:20])


def test_sequences_in_one_step_have_states_of_their_own(backend):
    b, expected, tables = backend, whole(backend), (TABLE, TABLE[::-1] + 8)
    b.step(Step((span(b, 0, 5, kept=[(4, 15)]), span(b, 0, 9, kept=[(8, 16)], table=tables[1]))))
    spans = span(b, 5, 20, 15, [(19, 17)]), span(b, 9, 10, 16, [(9, 18)], table=tables[1])
    equal(b, b.step(Step(spans)), np.concatenate([expected[5:20], expected[9:10]]))


def test_states_are_copied_saved_and_put_elsewhere(backend):
    b, expected, m = backend, whole(backend), state(backend)
    b.step(Step((span(b, 0, 12, kept=[(11, 2)]),)))
    saved = b.read_blocks(np.array([2], np.int32), m)
    assert saved.shape == (1, b.kv_bytes_per_block(m)) == (1, b.memories[m].state_bytes)
    b.copy_block(2, 6, m)
    b.allocate_kv(40, m)  # a pool that grows keeps what it holds
    b.write_blocks(np.array([37], np.int32), saved, m)
    b.write_blocks(np.array([2], np.int32), np.full_like(saved, 0xFF), m)
    for slot in (6, 37):
        equal(b, b.step(Step((span(b, 12, 40, slot),))), expected[12:40])


@pytest.mark.parametrize("make", [BACKENDS[0], BACKENDS[2]], ids=["cpu", "cuda"])
def test_a_slot_outside_the_pool_is_refused(family, make):
    b = allocate(make(RecurrentCheckpoint(family), WeightPolicy("none", 16), threads=1), 20)
    for wrong in (20, -2):
        with pytest.raises(ValueError, match="slot"):
            b.step(Step((span(b, 0, 3, kept=[(1, wrong)]),)))
        with pytest.raises(ValueError, match="slot"):
            b.step(Step((span(b, 3, 5, wrong),)))
