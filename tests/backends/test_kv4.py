"""Keys and values in 4 bits: what blocks give back, and what eviction does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backend_steps import BLOCKS, IDS, TABLE
from memories import allocate
from tiny import TinyCheckpoint

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import BLOCK, STRETCH, MemorySpec, Slots, Span, Step, Tails
from tinychat.backends.reference import ReferenceBackend
from tinychat.backends.reference_kv4 import Grid, KeyGrid, Kv4Pool
from tinychat.backends.reference_memory import KvPool
from tinychat.kernels_cpu import _native
from tinychat.network.weight_policy import WeightPolicy


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    return tmp_path


def test_a_grid_has_the_numbers_that_lie_on_it():
    for x in ([0.0] * 16, list(range(16)), [8.0 * i - 56 for i in range(16)], [0.0, 15.0] * 8):
        x = torch.tensor(x)
        np.testing.assert_array_equal(Grid.over(x, 0).rounded(x), x)


@pytest.mark.parametrize("middle", [0.0, 1.0, -40.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3000.0])
def test_a_number_is_off_by_a_step_at_most(size, middle):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32))
    x = (x + middle) * size
    got = Grid.over(x, 1).rounded(x)
    step = (x.amax(1) - x.amin(1)) / 15
    step = torch.maximum(step, x.abs().amax(1) / 111)  # zeros have 8 bits
    assert ((got - x).abs() <= step[:, None]).all()
    assert ((got - x).abs().square().mean(1).sqrt() < 0.4 * step).float().mean() > 0.95


def test_scales_and_offsets_of_8_bits_cost_keys_little():
    rng = torch.Generator().manual_seed(2)
    widths = torch.randn(64, generator=rng).mul(0.7).exp()  # some channels are ten times as wide as others
    k = torch.randn(40, BLOCK, 1, 64, generator=rng) * widths + 2 * torch.randn(64, generator=rng) * widths
    low, high = k.amin(1, keepdim=True), k.amax(1, keepdim=True)
    step = (high - low) / 15
    free = ((k - low) / step).round() * step + low
    assert (KeyGrid.over(k).rounded(k) - k).square().sum() < 1.03 * (free - k).square().sum()


def test_not_a_number_stays_visible():
    x = torch.arange(32.0).reshape(2, 16)
    x[0, 3] = np.nan
    got = Grid.over(x, 1).rounded(x)
    assert got[0].isnan().all()
    assert not got[1].isnan().any()


@pytest.fixture
def pool():
    spec = MemorySpec("paged", (0, 1), 2, 32)
    tail = KvPool(spec, 16)
    pool = Kv4Pool(spec, tail)
    pool.allocate(3), tail.allocate(1)
    rng = torch.Generator().manual_seed(1)
    for layer in range(2):
        for block in range(3):
            k, v = torch.randn(2, BLOCK, 2, 32, generator=rng)
            k[..., 0] *= 4  # the others are narrow beside it
            pool.pack(layer, block, k, v)
    return pool


def moves(*pairs):
    src = np.zeros((2, 2, BLOCK), np.int32) - 1
    dst = np.zeros((2, 2, BLOCK), np.int32)
    for i, (a, b) in enumerate(pairs):
        src[..., i], dst[..., i] = a, b
    return src, dst


def test_a_key_that_moves_leaves_those_beside_it_and_values_move_as_they_are(pool):
    before = pool.kv.clone()
    before[0, :, 32:] *= 0.4  # they fit into every range
    pool.kv[0, :, 32:] *= 0.4
    for _ in range(20):  # however often it happens
        pool.move_slots(np.arange(3), *moves((33, 5), (40, 21)), slots=48)
        pool.move_slots(np.arange(3), *moves((34, 5), (41, 21)), slots=48)
    moved = [5, 21]
    others = [i for i in range(32) if i not in moved]
    np.testing.assert_array_equal(pool.kv[:, :, others], before[:, :, others])
    np.testing.assert_array_equal(pool.kv[1, :, moved], before[1, :, [34, 41]])
    assert (pool.kv[0, :, moved] - before[0, :, [34, 41]])[..., 1:].abs().max() < 0.25
    assert (pool.kv[0, :, moved] - before[0, :, moved]).abs().max() > 0.5


def test_a_key_that_does_not_fit_gives_its_channel_another_range(pool):
    before = pool.kv.clone()
    others, channels = [i for i in range(32) if i != 5], [c for c in range(32) if c != 7]
    pool.kv[0, :, 40] *= 0.1
    pool.kv[0, :, 40, :, 7] = 6.0
    pool.move_slots(np.arange(3), *moves((40, 5)), slots=48)
    np.testing.assert_array_equal(pool.kv[0, :, others][..., channels], before[0, :, others][..., channels])
    np.testing.assert_allclose(pool.kv[0, :, 5, :, 7], 6.0, atol=0.1)
    assert (pool.kv[0, :, others][..., 7] - before[0, :, others][..., 7]).abs().max() < 0.4
    pool.kv[0, :, 41, :, 7] = 60.0  # the head has no steps so wide: all of its channels begin anew
    pool.move_slots(np.arange(3), *moves((41, 5)), slots=48)
    np.testing.assert_allclose(pool.kv[0, :, 5, :, 7], 60.0, atol=0.5)
    assert (pool.kv[0, :, others][..., 1:7] - before[0, :, others][..., 1:7]).abs().max() < 0.5


def span(start, end, length=None, position=None):
    """Tokens of IDS in both memories of a model in 4 bits, all of them asked for."""
    length = start if length is None else length
    memories = Slots(TABLE, length), Tails(TABLE)
    return Step((Span(IDS[start:end], start if position is None else position, 0, memories),))


def needed(length):
    """Blocks that a row behind so many slots reads exactly."""
    return {
        *range(length // STRETCH * STRETCH // BLOCK, -(-length // BLOCK)),
        *([0] if length >= STRETCH else []),
    }


def exact(length):
    """The same as backends are told: the tail has block TABLE[i] as the exact form of block i."""
    return np.where([i in needed(length) for i in range(len(TABLE))], TABLE, -1).astype(np.int32)


@pytest.fixture(params=_native.isas())
def both(request, monkeypatch):
    """The reference and the CPU backend, each with the same 75 tokens."""
    monkeypatch.setenv("TINYCHAT_ISA", request.param)
    checkpoint, policy = TinyCheckpoint(2, head_dim=24, n_layers=1), WeightPolicy("none", 16)
    backends = (
        ReferenceBackend(checkpoint, policy, kv_bits=4),
        CpuBackend(checkpoint, policy, kv_bits=4, act_bits=16),
    )
    for b in backends:
        allocate(b, BLOCKS).step(span(0, 75))
    return backends


def assert_alike(both, length, position):
    """The next tokens, and how far values lie from their mean."""
    weights = np.random.default_rng(5).random((1, 2, length), np.float32)
    spreads = [b.value_spread(TABLE, weights, 0, exact(length)) for b in both]
    np.testing.assert_allclose(*spreads, rtol=2e-3)
    logits = [b.step(span(75, 80, length, position)) for b in both]
    np.testing.assert_allclose(*logits, atol=0.02)
    return logits[0]


@pytest.mark.parametrize("slots", [75, 64])
def test_slots_move_between_blocks_and_the_tail_as_in_the_reference(both, slots):
    before, _ = (b.step(span(75, 80, slots, 75)) for b in both)
    n, left = 32, slots - 32
    rng = np.random.default_rng(slots)
    src, dst = (np.zeros((1, 2, n), np.int32) for _ in range(2))
    src -= 1
    for head in range(2):
        holes = int(rng.integers(20, 30))
        dst[0, head, :holes] = np.sort(rng.choice(left, holes, replace=False))
        src[0, head, :holes] = left + np.sort(rng.choice(n, holes, replace=False))
    for b in both:
        fresh = np.where(exact(slots) < 0, exact(left), -1).astype(np.int32)
        b.move_slots(TABLE, src, dst, 0, slots, exact(slots), fresh)
    assert np.abs(assert_alike(both, left, 75) - before).max() > 0.1


@pytest.mark.parametrize("slots", [75, 64])
def test_keys_turn_as_in_the_reference(both, slots):
    delta = np.random.default_rng(1).integers(-9, 9, (1, 2, slots)).astype(np.int32)
    delta[:, :, 16:32] = 0
    for b in both:
        b.turn_keys(TABLE, delta, 0, exact(slots))
    assert_alike(both, slots, 75)


def test_rows_read_their_stretch_and_the_first_block_exactly(both):
    checkpoint, policy = TinyCheckpoint(2, head_dim=24, n_layers=1), WeightPolicy("none", 16)
    halves = allocate(ReferenceBackend(checkpoint, policy, kv_bits=16), BLOCKS)
    whole = halves.step(Step.of(IDS[:75], 0, 0, TABLE, 0))
    for b in both:
        got = b.step(span(0, 75))
        np.testing.assert_allclose(got[:STRETCH], whole[:STRETCH], atol=0.005)
        off = np.abs(got[STRETCH:] - whole[STRETCH:]).mean() / whole.std()
        assert 1e-3 < off < 0.2
        for block, reads in ((0, False), (4, False), (1, True)):
            kept = b.read_blocks(TABLE[[block]])
            b.write_blocks(TABLE[[block]], np.full_like(kept, 0xFF))  # NaN
            assert np.isnan(b.step(span(75, 80))).any() == reads
            b.write_blocks(TABLE[[block]], kept)


def test_what_does_not_fit_is_refused(both):
    cpu = both[1]
    good = span(75, 80)
    has = good.spans[0].memories
    for tails, words in [
        (np.zeros(0, np.int32), "cover"),
        (np.where(np.arange(len(TABLE)) == 75 // BLOCK, -1, TABLE), "outside"),  # it has eleven slots already
        (np.full(len(TABLE), BLOCKS), "outside"),
        (np.where(np.arange(len(TABLE)) == 0, -1, TABLE), "first block"),
    ]:
        tails = tails.astype(np.int32)
        with pytest.raises(ValueError, match=words):
            cpu.step(Step((Span(IDS[75:80], 75, 0, (has[0], Tails(tails))),)))
    heads = np.zeros((1, 2, 75), np.int32)
    with pytest.raises(ValueError, match="tail"):
        cpu.turn_keys(TABLE, heads)
    with pytest.raises(ValueError, match="tail"):
        cpu.turn_keys(TABLE, heads, 0, np.full(len(TABLE), BLOCKS, np.int32))
    with pytest.raises(ValueError, match="in use"):
        cpu.move_slots(TABLE, heads[..., :32], heads[..., :32], 0, 16, exact(16))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_take_three_tenths_of_those_in_16_bits(dim):
    assert _native.kv_block_bytes(30, 3, dim, 4) <= 0.30 * _native.kv_block_bytes(30, 3, dim, 16)
