"""The KV cache and attention kernels under emulation, against the same sums in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulation import bench, needs_device

from tinychat.backends.reference_memory import quantize_kv
from tinychat.kernels_cuda import attention
from tinychat.kernels_cuda.head import LOGITS
from tinychat.kernels_cuda.inputs import Inputs, Sequence
from tinychat.kernels_cuda.linear import row_length

pytestmark = needs_device

BLOCKS = 40  # of the pool; the sequence's lie scattered in it
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)


@dataclass
class Case:
    """A cache that the kernels fill, and what was written to it."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    bits: int = 16
    window: int = 0
    cap: float = 0.0
    layers: int = 2
    pairs: int = 0

    def __post_init__(self):
        self.shape = attention.Shape(self.layers, self.heads, self.kv_heads, self.size, self.bits)
        self.kernels = attention.Attention(bench().modules, self.shape, bench().device.allocate(1 << 20))
        self.inputs = Inputs(bench().device, [self.shape.group])
        self.pool = bench().device.allocate(BLOCKS * self.shape.block_bytes)
        bench().device.clear(self.pool)
        self.keys = np.zeros((0, self.kv_heads, self.size), np.float32)
        self.values = np.zeros((0, self.kv_heads, self.size), np.float32)

    def stored(self, x):
        """What the cache gives back."""
        x = torch.from_numpy(x).half().float()
        return (x if self.bits == 16 else quantize_kv(x)).numpy()

    def call(self, rows, position=0, scores=None, watched=0):
        """Attention of as many rows behind what is there, in layer 1."""
        own = Sequence(0, rows, len(self.keys), TABLE, scores=scores, watched=watched)
        return self.call_of([own], position)

    def call_of(self, sequences, position=0):
        """Attention of these sequences' rows, in layer 1."""
        d, rows, none = bench().device, sum(s.rows for s in sequences), []
        z = self.step = self.inputs.size([sequences], none, LOGITS)
        self.inputs.reserve(z, [sequences])
        positions = list(range(position, position + rows))
        self.inputs.put(z, [sequences], np.zeros(rows, np.int32), positions, none, 0.0)
        self.q = d.allocate(rows * self.shape.query_bytes)
        self.totals = d.allocate(rows * self.heads * 8)
        return self.kernels.call(
            q=self.q, totals=self.totals, pool=self.pool, facts=self.inputs.facts(z, 0), rows=rows, layer=1,
            window=self.window, scale=self.size**-0.5, cap=self.cap,
        )  # fmt: skip

    def append(self, qkv, **watch):
        """Rows behind what is there; their attention is yet to come."""
        rows = len(qkv)
        call = self.call(rows, **watch)
        self.kernels.append(call, bench().put(qkv), None, 0)
        parts = qkv.reshape(rows, -1, self.size)
        self.keys = np.concatenate([self.keys, parts[:, self.heads : self.heads + self.kv_heads]])
        self.values = np.concatenate([self.values, parts[:, self.heads + self.kv_heads :]])
        return call

    def probabilities(self, q):
        """float64 [rows, heads, slots] for the last rows."""
        rows, n = len(q), len(self.keys)
        q = q.reshape(rows, self.heads, self.size).astype(np.float16).astype(np.float64)
        keys = np.repeat(self.stored(self.keys).astype(np.float64), self.heads // self.kv_heads, axis=1)
        s = np.einsum("rhd,shd->rhs", q, keys) * self.size**-0.5
        if self.cap:
            s = self.cap * np.tanh(s / self.cap)
        own, slot = np.arange(n - rows, n)[:, None, None], np.arange(n)
        seen = slot <= own
        if self.window:
            seen = seen & (slot > own - self.window)
        p = np.exp(np.where(seen, s, -np.inf) - s.max())
        return p / p.sum(-1, keepdims=True)

    def expected(self, q):
        values = np.repeat(self.stored(self.values).astype(np.float64), self.heads // self.kv_heads, axis=1)
        return np.einsum("rhs,shd->rhd", self.probabilities(q), values).reshape(len(q), -1)

    def attend(self, call, spread=True):
        """float16 [rows, heads · size]; spread: by stretches, else walked by rows."""
        b, ld, (extent,) = bench(), row_length(self.heads * self.size), self.step.extents
        to = b.device.allocate(call.rows * ld * 2)
        if spread:
            self.kernels.spread(call, to, call.rows, extent.pieces, extent.stretches)
        else:
            self.kernels.walk(call, to, 0, extent.pieces)
        out = b.get(to, (call.rows, ld), np.float16)
        assert not out[:, self.heads * self.size :].any()
        return out[:, : self.heads * self.size]


def random_rows(case, rows, seed=0):
    cols = (case.heads + 2 * case.kv_heads) * case.size
    return np.random.default_rng([seed, rows]).normal(size=(rows, cols)).astype(np.float32)


def queries(case, qkv):
    return qkv[:, : case.heads * case.size]


CASES = {
    "plain": {},
    "8 bits": dict(bits=8),
    "one KV head, many queries": dict(heads=7, kv_heads=1),
    "head 20": dict(size=20),
    "head 64, 8 bits": dict(size=64, bits=8, heads=6, kv_heads=3),
    "head 96": dict(size=96, heads=2, kv_heads=2),
    "head 128": dict(size=128, heads=2, kv_heads=1),
    "head 256": dict(size=256, heads=2, kv_heads=1),
    "head 256, 8 bits": dict(size=256, heads=1, kv_heads=1, bits=8),
    "window": dict(window=37),
    "soft cap": dict(cap=2.0),
    "window and cap, 8 bits": dict(window=70, cap=1.5, bits=8),
}


SLOW = ("head 96", "head 256")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_attention_is_the_softmax_over_what_is_cached(name):
    case = Case(**CASES[name])
    for rows in (70, 1, 16, 5):
        qkv = random_rows(case, rows)
        call = case.append(qkv)
        expected = case.expected(queries(case, qkv))
        got = case.attend(call, spread=rows <= 16)
        # Probabilities are halves in the product with values.
        np.testing.assert_allclose(got, expected, atol=3e-3)


@pytest.mark.parametrize("name", ["plain", "8 bits", "one KV head, many queries", "window", "head 128"])
def test_a_row_has_the_same_bits_spread_or_walked_in_any_company(name):
    qkv = random_rows(Case(**CASES[name]), 150)
    whole = Case(**CASES[name])
    expected = whole.attend(whole.append(qkv), spread=False)
    for cuts in ([120, 1, 1, 5, 16, 7], [64, 64, 22]):
        case, at = Case(**CASES[name]), 0
        for n in cuts:
            call = case.append(qkv[at : at + n])
            for spread in (False, True):
                np.testing.assert_array_equal(case.attend(call, spread), expected[at : at + n])
            at += n


def test_a_small_workspace_is_used_several_times():
    case = Case()
    call = case.append(random_rows(case, 12))
    expected = case.attend(call)
    small = bench().device.allocate(case.kernels.row_bytes(4) * 5)
    case.kernels = attention.Attention(bench().modules, case.shape, small)
    np.testing.assert_array_equal(case.attend(call), expected)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    "name", ["plain", "8 bits", "one KV head, many queries", "soft cap", "head 256, 8 bits"]
)
def test_scores_are_the_probabilities_that_slots_got(name, apart):
    case = Case(**CASES[name])
    case.append(random_rows(case, 70))
    for rows, watched in ((1, 1), (7, 5), (16, 16)):
        qkv = random_rows(case, rows)
        call = case.append(qkv, scores=np.empty(watched if apart else 1), watched=watched)
        case.attend(call)
        n = len(case.keys) + 3  # the caller's array may be wider
        b, shape = bench(), (watched if apart else 1, case.layers, case.kv_heads, n)
        scores = b.put(np.full(shape, 7, np.float32))
        case.kernels.score(call, scores, 1, n)
        alone = apart or watched == 1
        p = case.probabilities(queries(case, qkv))[-watched:]
        p = p.reshape(watched, case.kv_heads, -1, p.shape[-1]).sum(2)
        got = b.get(scores, shape)[:, 1]
        np.testing.assert_allclose(got[..., :-3], p if alone else 7 + p.sum(0)[None], atol=2e-3)
        np.testing.assert_array_equal(got[..., -3:], 0 if alone else 7)


@pytest.mark.parametrize("pairs", [10, 16, 5])
@pytest.mark.parametrize("bits", [16, 8])
def test_queries_and_keys_are_turned(bits, pairs):
    """By comparing scores with those of vectors turned in float64; at a position where floats would fail."""
    case, position = Case(bits=bits, size=32), 123_457
    frequencies = 10000.0 ** -(np.arange(pairs) / pairs)
    qkv = random_rows(case, 9)
    b = bench()
    call, table = case.call(9, position), b.device.allocate(9 * pairs * 8)
    case.kernels.turns(case.inputs.positions(case.step), b.put(frequencies), table, 9, pairs, 1.5)
    case.kernels.append(call, b.put(qkv), table, pairs)

    angle = (position + np.arange(9))[:, None, None] * frequencies
    x = qkv.reshape(9, -1, 32).astype(np.float64)
    one, two, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = 1.5 * np.cos(angle), 1.5 * np.sin(angle)
    turned = np.concatenate([one * cos - two * sin, two * cos + one * sin, rest], axis=-1)
    got = b.get(case.q, (9, case.heads, 32), np.float16)
    np.testing.assert_allclose(got, turned[:, : case.heads], atol=4e-3)
    case.keys = turned[:, case.heads : case.heads + case.kv_heads].astype(np.float32)
    case.values = qkv.reshape(9, -1, 32)[:, case.heads + case.kv_heads :]
    out = case.attend(call)
    np.testing.assert_allclose(out, case.expected(got), atol=2e-2 if bits == 8 else 3e-3)


@pytest.mark.parametrize("bits", [16, 8])
def test_moved_slots_hold_what_they_were_given(bits):
    case = Case(bits=bits)
    case.append(random_rows(case, 80))
    rng = np.random.default_rng(0)
    n, b = 16, bench()
    src = np.full((2, 2, n), -1, np.int32)
    dst = np.zeros((2, 2, n), np.int32)
    for head in range(2):
        moved = int(rng.integers(1, n))
        src[1, head, :moved] = 64 + rng.permutation(16)[:moved]
        dst[1, head, :moved] = rng.permutation(64)[:moved]
        case.keys[dst[1, head, :moved], head] = case.keys[src[1, head, :moved], head]
        case.values[dst[1, head, :moved], head] = case.values[src[1, head, :moved], head]
    case.kernels.move(case.pool, b.put(TABLE), b.put(src), b.put(dst), n)
    case.keys, case.values = case.keys[:64], case.values[:64]
    qkv = random_rows(case, 3)
    got = case.attend(case.append(qkv))
    np.testing.assert_allclose(got, case.expected(queries(case, qkv)), atol=3e-3)


@pytest.mark.parametrize("bits", [16, 8])
def test_keys_are_turned_in_place(bits):
    case = Case(bits=bits)
    case.append(random_rows(case, 50))
    b, pairs, n = bench(), 16, 40
    frequencies = 10000.0 ** -(np.arange(pairs) / pairs)
    delta = np.random.default_rng(0).integers(-90, 1, (2, 2, n)).astype(np.int32)
    case.kernels.turn(case.pool, b.put(TABLE), b.put(delta), b.put(frequencies), n, pairs)
    angle = delta[1].T[..., None] * frequencies
    x = case.stored(case.keys[:n]).astype(np.float64)
    one, two = x[..., :pairs], x[..., pairs:]
    case.keys[:n] = np.concatenate(
        [one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)], axis=-1
    )
    qkv = random_rows(case, 2)
    got = case.attend(case.append(qkv))
    np.testing.assert_allclose(got, case.expected(queries(case, qkv)), atol=2e-2 if bits == 8 else 3e-3)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("size", "n"),
    [(20, 1), (32, 77), (64, 16), (96, 33), (128, 300), pytest.param(256, 45, marks=pytest.mark.slow)],
)
def test_the_spread_of_values_is_how_far_they_lie_from_their_mean(size, n, bits):
    """Layer 0 is empty: zeros lie where their mean does. The last head's weights are zero."""
    case, b = Case(heads=3, kv_heads=3, size=size, bits=bits), bench()
    qkv = random_rows(case, n + 9)
    qkv[:, -2 * size :] += 30  # a mean that is far from zero
    case.append(qkv[:n])
    w = np.random.default_rng(n).exponential(size=(2, 3, n)).astype(np.float32)
    w[:, 1] *= 1e-6
    w[:, 2] = 0
    weights, to = b.put(w), b.put(np.full((2, 3, n + 1), 7, np.float32))

    def spread():
        case.kernels.value_spread(case.pool, b.put(TABLE), weights, to, n)
        return b.get(to, 6 * n + 1)

    got = spread()
    values = case.stored(case.values).astype(np.float16).astype(np.float64).transpose(1, 0, 2)
    w[:, 2] = 1
    mean = (w[1][..., None] * values).sum(1, keepdims=True) / w[1].sum(1)[:, None, None]
    expected = np.linalg.norm(values - mean, axis=2)
    assert got[-1] == 7
    np.testing.assert_array_equal(got[: 3 * n], 0)
    np.testing.assert_allclose(got[3 * n : -1].reshape(3, n), expected, rtol=1e-5, atol=1e-4)
    case.append(qkv[n:])
    np.testing.assert_array_equal(spread(), got)  # nothing behind the first n counts
