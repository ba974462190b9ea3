"""Rotary embedding and paged attention against torch, over scattered blocks and any cut of the rows."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from programs import ISAS, Bench

from tinychat.backends.reference_memory import quantize_kv
from tinychat.kernels_cpu import _native

NONE = np.empty(0, np.int32)  # of a cache in 16 or 8 bits no block has another form


class Attention:
    """One layer: qkv in, attention out, over a pool with a scrambled block table."""

    def __init__(
        self,
        isa,
        heads,
        kv,
        dim,
        *,
        rotated=None,
        threads=2,
        blocks=80,
        max_rows=512,
        poison=False,
        bits=16,
        window=0,
        cap=0.0,
    ):
        self.window, self.cap = window, cap
        self.heads, self.kv, self.dim, self.rotated, self.bits = heads, kv, dim, rotated or dim, bits
        self.b = Bench(isa, threads=threads, max_rows=max_rows)
        self.freq = 10000.0 ** -(np.arange(0, self.rotated, 2) / self.rotated)
        table = self.b.p.rope_table(list(self.freq))
        self.qkv = self.b.p.floats((heads + 2 * kv) * dim)
        self.out = self.b.p.floats(heads * dim)
        at = _native.Attention(heads, kv, dim, layer=1, window=window, cap=cap)
        self.b.p.rope_kv(at, self.qkv, table)
        self.b.p.attention(at, self.qkv, self.out)
        size = _native.kv_block_bytes(2, kv, dim, bits)
        pool = np.frombuffer(mmap.mmap(-1, size * blocks), np.uint8)
        if poison:
            pool[:] = 0xFF  # fp16 NaN everywhere: slots that were never written must not be felt
        self.b.p.set_kv(0, pool, blocks, 2, kv, dim, bits)
        self.table = np.random.default_rng(5).permutation(blocks).astype(np.int32)

    def run(self, qkv, length, position=None):
        """Rows appended at `length`: [rows, heads·dim]."""
        self.b.p.array(self.qkv)[: len(qkv)] = qkv
        self.b.run(len(qkv), length if position is None else position, length, self.table)
        return self.b.view(self.out, len(qkv))

    def scored(self, qkv, length, rows, sum_rows=False, from_zero=False):
        """As `run`, and what is added to the scores of the layer: [rows or 1, kv heads, slots]."""
        self.b.p.array(self.qkv)[: len(qkv)] = qkv
        shape = 1 if sum_rows else rows, 2, self.kv, length + len(qkv) + 3
        before = np.random.default_rng(6).random(shape, np.float32)
        if from_zero:
            before[:] = 0
        before[..., -3:] = np.nan  # slots behind the step's last are not touched
        scores = before.copy()
        ids = np.zeros(len(qkv), np.int32)
        self.b.p.run(((ids, length, len(qkv), ((self.table, length, scores, rows),)),))
        assert np.isnan(scores[..., -3:]).all()
        np.testing.assert_array_equal(scores[:, 0], before[:, 0])  # nor are other layers
        return self.b.view(self.out, len(qkv)), (scores - before)[:, 1, :, :-3]

    def stored(self, x):
        """Keys or values [rows, heads, dim] as the cache gives them back."""
        x = x.half()
        return (x if self.bits == 16 else quantize_kv(x.float())).double()

    def truth(self, qkv, position=0):
        """All rows at once, float64; keys and values rounded as the cache does. Also the probabilities."""
        n, h, g, d, r = len(qkv), self.heads, self.kv, self.dim, self.rotated
        x = torch.from_numpy(qkv).double()
        q, k, v = x.split([h * d, g * d, g * d], dim=1)
        angle = (position + torch.arange(n).double())[:, None] * torch.from_numpy(self.freq)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def rotate(t):
            a, b, rest = t.split([r // 2, r // 2, d - r], dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

        q, k, v = rotate(q.reshape(n, h, d)), rotate(k.reshape(n, g, d)), v.reshape(n, g, d)
        k, v = (self.stored(t).repeat_interleave(h // g, 1) for t in (k, v))
        logits = torch.einsum("rhd,shd->hrs", q, k) / d**0.5
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        hidden = torch.ones(n, n).triu(1).bool()
        if self.window:
            hidden |= torch.ones(n, n).tril(-self.window).bool()
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        self.probabilities = p.reshape(g, h // g, n, n).sum(1).transpose(0, 1).numpy()  # [rows, kv, slots]
        return torch.einsum("hrs,shd->rhd", p, v).reshape(n, h * d).numpy()


def assert_close(got, expected, bits):
    """q is fp32, k and v are the cache's. In 8 bits a value on the edge between two codes may take either,
    since the truth rotates in fp64: rare, and as large as a code.
    """
    np.testing.assert_allclose(got, expected, atol=3e-3 if bits == 16 else 5e-2)
    assert (np.abs(got - expected) > 3e-3).mean() < 2e-3


def rows(rng, n, a):
    return rng.normal(size=(n, (a.heads + 2 * a.kv) * a.dim)).astype(np.float32) * 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 128), (8, 1, 80), (6, 2, 8), (16, 1, 32)])
def test_prefill_and_decode_are_causal_attention(isa, shape, bits):
    rng = np.random.default_rng(sum(shape))
    a = Attention(isa, *shape, poison=True, bits=bits)
    n = 300 if isa == "scalar" else 700  # crosses one or two parts of 256 slots
    qkv = rows(rng, n, a)
    expected = a.truth(qkv)
    got = (
        a.run(qkv[: n - 40], 0)
        if n <= 512
        else np.concatenate([a.run(qkv[:512], 0), a.run(qkv[512 : n - 40], 512)])
    )
    assert_close(got, expected[: n - 40], bits)
    at = n - 40
    for step in (1, 5, 2, 1, 16, 15):
        assert_close(a.run(qkv[at : at + step], at), expected[at : at + step], bits)
        at += step
    assert at == n


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_however_the_rows_are_cut(isa):
    rng = np.random.default_rng(1)
    n = 290
    a = Attention(isa, 6, 2, 32, blocks=40)
    qkv = rows(rng, n, a)
    whole = a.run(qkv, 0)
    for cut in ([1] * n, [100, 100, 90], [17] * 17 + [1], [16] * 18 + [2], [255, 1, 1, 33]):
        b = Attention(isa, 6, 2, 32, threads=3, blocks=40)
        at, parts = 0, []
        for step in cut:
            parts.append(b.run(qkv[at : at + step], at))
            at += step
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("window", "cap"), [(1, 0.0), (37, 0.0), (300, 3.0), (0, 3.0), (256, 0.0)])
def test_a_window_and_a_cap(isa, window, cap):
    rng = np.random.default_rng(window)
    a = Attention(isa, 6, 2, 32, window=window, cap=cap, poison=True)
    n = 620
    qkv = rows(rng, n, a)
    expected = a.truth(qkv)
    got, scores = a.scored(qkv[:500], 0, 32, sum_rows=True)
    assert_close(got, expected[:500], 16)
    assert_close(scores[0], a.probabilities[468:500, :, :500].sum(0), 16)
    at, parts = 500, []
    for step in (1, 5, 16, 1, 97):
        parts.append(a.run(qkv[at : at + step], at))
        assert_close(parts[-1], expected[at : at + step], 16)
        at += step
    b = Attention(isa, 6, 2, 32, window=window, cap=cap, threads=3)
    np.testing.assert_array_equal(b.run(qkv[:500], 0), got)  # being watched changes nothing
    np.testing.assert_array_equal(b.run(qkv[500:], 500), np.concatenate(parts))  # nor does another cut


@pytest.mark.parametrize("bits", [16, 8])
def test_every_isa_gives_the_same_bits(bits):
    results = []
    for isa in ISAS:
        a = Attention(isa, 4, 2, 48, blocks=40, bits=bits, window=200, cap=5.0)
        qkv = rows(np.random.default_rng(3), 280, a)
        results.append(np.concatenate([a.run(qkv[:270], 0), a.run(qkv[270:], 270)]))
    for r in results[1:]:
        np.testing.assert_array_equal(r, results[0])


def test_partial_rotation_and_far_positions():
    rng = np.random.default_rng(4)
    a = Attention(ISAS[0], 4, 2, 64, rotated=32)
    qkv = rows(rng, 50, a)
    far = 131_000  # fp32 angles would be off by hundredths of a radian here
    np.testing.assert_allclose(a.run(qkv, 0, position=far), a.truth(qkv, far), atol=3e-3)


def test_keys_beyond_fp16_do_not_poison_the_row():
    rng = np.random.default_rng(6)
    a = Attention(ISAS[0], 2, 1, 32)
    qkv = rows(rng, 20, a)
    qkv[3, 64:] *= 1e6
    assert np.isfinite(a.run(qkv, 0)).all()


def test_blocks_outside_the_pool_are_refused():
    a = Attention(ISAS[0], 2, 1, 32, blocks=4)
    qkv = rows(np.random.default_rng(0), 20, a)
    for table in ([0], [0, 4], [0, -1]):
        a.table = np.array(table, np.int32)
        with pytest.raises(ValueError, match="block"):
            a.run(qkv, 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", [(9, 3, 64), (8, 1, 24), (20, 1, 32)])
def test_scores_are_the_attention_probabilities(isa, bits, shape):
    a = Attention(isa, *shape, bits=bits, poison=True)
    n = 590
    qkv = rows(np.random.default_rng(7), n, a)
    expected = a.truth(qkv)
    p = a.probabilities
    got, scores = a.scored(qkv[:500], 0, 32, sum_rows=True)  # a prompt's chunk: its last rows, summed
    assert_close(scores[0], p[468:500, :, :500].sum(0), bits)
    plain = Attention(isa, *shape, bits=bits)
    np.testing.assert_array_equal(plain.run(qkv[:500], 0), got)  # being watched changes nothing
    at = 500
    for step in (1, 5, 16, 20, 48):
        got, scores = a.scored(qkv[at : at + step], at, min(step, 17))
        assert_close(got, expected[at : at + step], bits)
        end = at + step
        assert_close(scores, p[end - len(scores) : end, :, :end], bits)
        at = end


def test_a_rows_scores_have_the_same_bits_however_the_rows_are_cut():
    seen = []
    for cut in ([1] * 24, [8] * 3, [5, 16, 3]):
        a = Attention(ISAS[0], 6, 2, 32, blocks=40, threads=3)
        qkv = rows(np.random.default_rng(8), 324, a)
        a.run(qkv[:300], 0)
        at, parts = 300, []
        for step in cut:
            for row in a.scored(qkv[at : at + step], at, step, from_zero=True)[1]:
                parts.append(np.pad(row, ((0, 0), (0, 324 - row.shape[1]))))
            at += step
        seen.append(np.stack(parts))
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [16, 8])
def test_attention_does_not_care_which_slot_holds_a_token(isa, bits):
    """Slots 3, 20 and 45 of one KV head are given up; the last three tokens take their places."""
    rng = np.random.default_rng(9)
    a, n = Attention(isa, 4, 2, 48, bits=bits), 50
    qkv = rows(rng, n + 1, a)
    a.run(qkv[:n], 0)
    src, dst = np.full((2, 2, 3), -1, np.int32), np.zeros((2, 2, 3), np.int32)
    src[1], dst[1] = [47, 48, 49], [3, 20, 45]
    a.b.p.move_slots(0, a.table, src, dst, 0, NONE)
    # The truth: the same query over the tokens that are left, at their own positions (the step's is n).
    a.b.p.array(a.qkv)[:1] = qkv[n:]
    a.b.run(1, n, n - 3, a.table)
    got = a.b.view(a.out, 1)
    kept = [i for i in range(n) if i not in (3, 20, 45)]
    h, g, d = 4, 2, 48
    x = torch.from_numpy(qkv).double()
    q, k, v = x.split([h * d, g * d, g * d], dim=1)
    angle = torch.arange(n + 1).double()[:, None] * torch.from_numpy(a.freq)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(t):
        a, b = t.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k = rotate(q.reshape(-1, h, d))[n], a.stored(rotate(k.reshape(-1, g, d)))
    v, kept = a.stored(v.reshape(-1, g, d)), [*kept, n]
    k, v = (t[kept].repeat_interleave(h // g, 1) for t in (k, v))
    p = (torch.einsum("hd,shd->hs", q, k) / d**0.5).softmax(-1)
    assert_close(got[0], torch.einsum("hs,shd->hd", p, v).flatten().numpy(), bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rotated", [48, 32])
def test_turned_keys_are_those_of_the_new_positions(isa, bits, rotated):
    rng = np.random.default_rng(10)
    a = Attention(isa, 4, 2, 48, rotated=rotated, bits=bits)
    b = Attention(isa, 4, 2, 48, rotated=rotated, bits=bits)
    qkv = rows(rng, 41, a)
    a.run(qkv[:40], 0, position=900)
    a.b.p.turn_keys(0, a.table, [float(f) for f in a.freq], np.full((2, 2, 40), -900, np.int32), NONE)
    b.run(qkv[:40], 0)
    tolerance = 4e-3 if bits == 16 else 0.15  # rounded to 8 bits twice; a wrong angle is off by 1 and more
    np.testing.assert_allclose(a.run(qkv[40:], 40), b.run(qkv[40:], 40), atol=tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("dim", "n"), [(48, 1), (48, 37), (64, 300), (10, 16)])
def test_how_far_values_lie_from_their_mean(isa, bits, dim, n):
    rng = np.random.default_rng(11)
    a = Attention(isa, 4, 2, dim, blocks=20, bits=bits, threads=3)
    qkv = rows(rng, n, a)
    a.run(qkv, 0)
    weights = rng.exponential(size=(2, 2, n)).astype(np.float32)
    weights[1, 0] = 0  # they count alike
    out = np.empty((2, 2, n), np.float32)
    a.b.p.value_spread(0, a.table, weights, out, NONE)
    v = a.stored(torch.from_numpy(qkv).double()[:, 6 * dim :].reshape(n, 2, dim)).numpy()
    weights[1, 0] = 1
    w = (weights / weights.sum(2, keepdims=True))[1]  # the layer that the step wrote
    mean = np.einsum("hn,nhd->hd", w, v)
    np.testing.assert_allclose(out[1], np.linalg.norm(v - mean, axis=2).T, rtol=1e-4, atol=1e-5)


def test_slots_outside_the_table_are_refused():
    a = Attention(ISAS[0], 2, 1, 32, blocks=4)
    here = np.zeros((2, 1, 1), np.int32)
    with pytest.raises(ValueError, match="slot"):
        a.b.p.move_slots(0, a.table, here + 64, here, 0, NONE)
    with pytest.raises(ValueError, match="slot"):
        a.b.p.move_slots(0, a.table, here, here - 1, 0, NONE)
    with pytest.raises(ValueError, match="layer"):
        a.b.p.move_slots(0, a.table, here[:1], here[:1], 0, NONE)
    with pytest.raises(ValueError, match="slot"):
        a.b.p.turn_keys(0, a.table, [1.0], np.zeros((2, 1, 65), np.int32), NONE)
    weights = np.zeros((2, 1, 65), np.float32)
    with pytest.raises(ValueError, match="slot"):
        a.b.p.value_spread(0, a.table, weights, weights.copy(), NONE)
    with pytest.raises(ValueError, match="results"):
        a.b.p.value_spread(0, a.table, weights[:, :, :9].copy(), weights, NONE)


def test_an_8_bit_cache_takes_little_more_than_half():
    for dim in (64, 128):
        assert _native.kv_block_bytes(30, 3, dim, 8) <= 0.54 * _native.kv_block_bytes(30, 3, dim, 16)
