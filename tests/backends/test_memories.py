"""Layers that are alike share a memory, and each memory has a pool of its own: the results are the same."""

from __future__ import annotations

import numpy as np
import pytest
import span_schedules
from backend_steps import IDS
from span_schedules import BLOCKS, poison
from tiny import TinyCheckpoint

from tinychat.backends import cpu as cpu_backend
from tinychat.backends import reference as reference_backend
from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import MemorySpec, Slots, Span, Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.network.config import RopeConfig
from tinychat.network.weight_policy import WeightPolicy

WINDOW = 37
ONE = (MemorySpec("paged", (0, 1, 2, 3), 2, 16),)
SPLIT = (MemorySpec("paged", (1, 3), 2, 16), MemorySpec("window", (0, 2), 2, 16, WINDOW))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def backend(monkeypatch):
    """`backend(memories, kind, **options)`: even layers have a window and a rope of their own."""

    def make(memories, kind=CpuBackend, **options):
        for module in (cpu_backend, reference_backend):
            monkeypatch.setattr(module, "memories_of", lambda cfg: memories)
        local = dict(window=WINDOW, windowed_layers=(0, 2), local_rope=RopeConfig(theta=50.0, dim=16))
        checkpoint = TinyCheckpoint(4, n_layers=4, context_length=512, **local)
        b = kind(checkpoint, WeightPolicy("none", 16), **options)
        for m in range(len(memories)):
            b.allocate_kv(BLOCKS, m)
            poison(b, np.arange(BLOCKS), m)
        return b

    return make


def tables(b, seed=0):
    return [
        np.random.default_rng(seed + m).permutation(BLOCKS).astype(np.int32) for m in range(len(b.memories))
    ]


def feed(b, blocks, start, end, position=None):
    """Logits of the last of the tokens start … end-1 of IDS."""
    memories = tuple(Slots(table, start) for table in blocks)
    position = start if position is None else position
    return b.step(Step((Span(IDS[start:end], position, end - start - 1, memories),)))


@pytest.mark.parametrize("options", [{}, dict(kv_bits=8, threads=3)], ids=["16 bits", "8 bits"])
def test_split_memories_give_the_bits_of_one(backend, options):
    one, split = backend(ONE, **options), backend(SPLIT, **options)
    for seed, n in enumerate((1, 3, 6)):
        expected, whole_scores = span_schedules.run(one, seed, n, together=False)
        got, scores = span_schedules.run(split, seed, n, together=True)
        whole_scores = [[a[:, list(SPLIT[0].layers)] for a in s] for s in whole_scores]
        span_schedules.assert_same((got, scores), (expected, whole_scores))


def test_split_memories_of_the_reference(backend):
    one, split = (backend(memories, ReferenceBackend) for memories in (ONE, SPLIT))
    expected, _ = span_schedules.run(one, 1, 3, together=False)
    got, _ = span_schedules.run(split, 1, 3, together=True)
    span_schedules.assert_same((got, []), (expected, []), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
def test_what_is_done_to_one_memory_is_not_done_to_the_other(backend, kind):
    one, split = backend(ONE, kind), backend(SPLIT, kind)
    feed(one, tables(one), 0, 50), feed(split, tables(split), 0, 50)
    assert sum(split.kv_bytes_per_block(m) for m in (0, 1)) >= one.kv_bytes_per_block()
    whole = one.value_spread(tables(one)[0], np.ones((4, 2, 50), np.float32))
    for m, spec in enumerate(SPLIT):
        assert split.kv_heads(m) == (2, 2)
        weights = np.ones((2, 2, 50), np.float32)
        spread = split.value_spread(tables(split)[m], weights, m)
        np.testing.assert_allclose(spread, whole[list(spec.layers)], rtol=1e-4)
    saved = [split.read_blocks(t[:4], m) for m, t in enumerate(tables(split))]
    expected = feed(split, tables(split), 50, 51)
    elsewhere = tables(split, 9)
    for m, data in enumerate(saved):
        assert data.shape == (4, split.kv_bytes_per_block(m))
        split.allocate_kv(
            BLOCKS + 5, m
        )  # a pool that grows keeps its blocks, and the other pool stays as it is
        split.write_blocks(elsewhere[m][:4], data, m)
    np.testing.assert_array_equal(feed(split, elsewhere, 50, 51), expected)
    copied = [elsewhere[0], elsewhere[1].copy()]
    copied[1][2] = BLOCKS + 1
    split.copy_block(int(elsewhere[1][2]), BLOCKS + 1, 1)
    poison(split, elsewhere[1][2:3], 1)
    np.testing.assert_array_equal(feed(split, copied, 50, 51), expected)


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
@pytest.mark.parametrize("memory", [0, 1])
def test_slots_move_within_a_memory(backend, kind, memory):
    b = backend(SPLIT, kind)
    blocks = tables(b)
    feed(b, blocks, 0, 50)

    def move(src, dst):
        heads = np.zeros((2, 2, 2), np.int32)
        b.move_slots(blocks[memory], heads + np.int32(src), heads + np.int32(dst), memory)
        return feed(b, blocks, 50, 51)

    expected = feed(b, blocks, 50, 51)
    np.testing.assert_array_equal(move([20, 21], [60, 61]), expected)  # nobody looks there
    assert np.abs(move([40, 41], [20, 21]) - expected).max() > 1e-3
    np.testing.assert_array_equal(move([60, 61], [20, 21]), expected)


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
def test_keys_turn_by_the_rope_of_each_layer(backend, kind):
    b, fresh = backend(SPLIT, kind), backend(SPLIT, kind)
    feed(b, tables(b), 0, 50, position=900), feed(fresh, tables(fresh), 0, 50)
    expected = feed(fresh, tables(fresh), 50, 51)
    back = np.full((2, 2, 50), -900, np.int32)
    b.turn_keys(tables(b)[1], back, 1)
    assert np.abs(feed(b, tables(b), 50, 51) - expected).max() > 0.3  # half of the layers are still far away
    b.turn_keys(tables(b)[0], back, 0)
    np.testing.assert_allclose(feed(b, tables(b), 50, 51), expected, atol=0.05)
