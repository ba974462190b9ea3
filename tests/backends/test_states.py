"""Recurrent layers in the reference backend: rows go through a state one by one, any row's may be kept."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TinyCheckpoint

from tinychat.backends import reference
from tinychat.backends.interface import MemorySpec, Span, States, Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.models import FAMILIES, llama
from tinychat.network.weight_policy import WeightPolicy

SIZE = 64  # values of a layer's state
IDS = np.random.default_rng(3).integers(0, 258, 40).astype(np.int32)


def update(state, row):
    state = 0.5 * state + row
    return state, state * row


def forward(ops, cfg, w):
    """An embedding and two recurrences, one behind the other, whose last state a row's logits show."""
    return ops.recur(ops.recur(ops.embed(w.embed), 0, update), 1, update)[ops.asked]


@pytest.fixture
def backend(monkeypatch):
    spec = MemorySpec("state", (0, 1), state_bytes=2 * 4 * SIZE)
    monkeypatch.setattr(reference, "memories_of", lambda cfg: (spec,))
    monkeypatch.setitem(FAMILIES, "toy", SimpleNamespace(load=llama.load, forward=forward))
    b = ReferenceBackend(TinyCheckpoint(5, family="toy"), WeightPolicy("none", 16))
    b.allocate_kv(8)
    return b


def truth(b, ids):
    """float32 [T, SIZE], the rows in a plain loop."""
    x = b.weights.embed[0].numpy()[ids]
    for _ in range(2):
        state, out = np.zeros(SIZE, np.float32), np.empty_like(x)
        for i, row in enumerate(x):
            state = np.float32(0.5) * state + row
            out[i] = state * row
        x = out
    return x


def span(start, end, source, kept=()):
    """kept: (token, slot) pairs of the sequence."""
    slots = np.full(end - start, -1, np.int32)
    for token, slot in kept:
        slots[token - start] = slot
    return Span(IDS[start:end], start, 0, (States(source, slots),))


def test_rows_pass_one_by_one_however_they_are_cut(backend):
    expected = truth(backend, IDS)
    for cuts in ([40], [1] * 40, [7, 1, 16, 16]):
        at, source, out = 0, -1, []
        for n in cuts:
            out.append(backend.step(Step((span(at, at + n, source, [(at + n - 1, 3)]),))))
            at, source = at + n, 3
        np.testing.assert_array_equal(np.concatenate(out), expected)


def test_a_draft_rolls_back_to_an_earlier_row(backend):
    expected = truth(backend, IDS)
    backend.step(Step((span(0, 10, -1, [(9, 0)]),)))
    draft = Span(
        IDS[[10, 11, 0, 0]], 10, 0, (States(0, np.array([0, 1, 2, 4], np.int32)),)
    )  # 0 is source too
    np.testing.assert_array_equal(backend.step(Step((draft,)))[:2], expected[10:12])
    np.testing.assert_array_equal(backend.step(Step((span(12, 20, 1),))), expected[12:20])
    np.testing.assert_array_equal(backend.step(Step((span(11, 20, 0),))), expected[11:20])


def test_spans_have_states_of_their_own(backend):
    expected = truth(backend, IDS)
    backend.step(Step((span(0, 5, -1, [(4, 0)]), span(0, 9, -1, [(8, 1)]))))
    out = backend.step(Step((span(5, 20, 0, [(19, 0)]), span(9, 10, 1), span(0, 3, -1))))
    np.testing.assert_array_equal(out, np.concatenate([expected[5:20], expected[9:10], expected[:3]]))


def test_states_are_copied_saved_and_put_elsewhere(backend):
    expected = truth(backend, IDS)
    backend.step(Step((span(0, 12, -1, [(11, 2)]),)))
    saved = backend.read_blocks(np.array([2], np.int32))
    assert saved.shape == (1, backend.kv_bytes_per_block()) == (1, 2 * 4 * SIZE)
    backend.copy_block(2, 6)
    backend.allocate_kv(20)  # a pool that grows keeps what it holds
    backend.write_blocks(np.array([17], np.int32), saved)
    backend.write_blocks(np.array([2], np.int32), np.full_like(saved, 0xFF))
    for slot in (6, 17):
        np.testing.assert_array_equal(backend.step(Step((span(12, 40, slot),))), expected[12:])
