"""Rotary embedding and paged attention against torch, over scattered blocks and any cut of the rows."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from programs import ISAS, Bench

from tinychat.kernels_cpu import _native


class Attention:
    """One layer: qkv in, attention out, over a pool with a scrambled block table."""

    def __init__(
        self, isa, heads, kv, dim, *, rotated=None, threads=2, blocks=80, max_rows=512, poison=False
    ):
        self.heads, self.kv, self.dim, self.rotated = heads, kv, dim, rotated or dim
        self.b = Bench(isa, threads=threads, max_rows=max_rows)
        self.freq = 10000.0 ** -(np.arange(0, self.rotated, 2) / self.rotated)
        table = self.b.p.rope_table(list(self.freq))
        self.qkv = self.b.p.floats((heads + 2 * kv) * dim)
        self.out = self.b.p.floats(heads * dim)
        self.b.p.rope_kv(self.qkv, table, heads, kv, dim, 1)
        self.b.p.attention(self.qkv, heads, kv, dim, 1, self.out)
        size = _native.kv_block_bytes(2, kv, dim)
        pool = np.frombuffer(mmap.mmap(-1, size * blocks), np.uint8)
        if poison:
            pool[:] = 0xFF  # fp16 NaN everywhere: slots that were never written must not be felt
        self.b.p.set_kv(pool, blocks, 2, kv, dim)
        self.table = np.random.default_rng(5).permutation(blocks).astype(np.int32)

    def run(self, qkv, length, position=None):
        """Rows appended at `length`: [rows, heads·dim]."""
        self.b.p.array(self.qkv)[: len(qkv)] = qkv
        self.b.run(len(qkv), length if position is None else position, length, self.table)
        return self.b.view(self.out, len(qkv))

    def truth(self, qkv, position=0):
        """All rows at once, float64; keys and values rounded to fp16 as the cache does."""
        n, h, g, d, r = len(qkv), self.heads, self.kv, self.dim, self.rotated
        x = torch.from_numpy(qkv).double()
        q, k, v = x.split([h * d, g * d, g * d], dim=1)
        angle = (position + torch.arange(n).double())[:, None] * torch.from_numpy(self.freq)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def rotate(t):
            a, b, rest = t.split([r // 2, r // 2, d - r], dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

        q, k = rotate(q.reshape(n, h, d)), rotate(k.reshape(n, g, d)).half().double()
        v = v.reshape(n, g, d).half().double()
        y = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )
        return y[0].transpose(0, 1).reshape(n, h * d).numpy()


def rows(rng, n, a):
    return rng.normal(size=(n, (a.heads + 2 * a.kv) * a.dim)).astype(np.float32) * 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 128), (8, 1, 80), (6, 2, 8), (16, 1, 32)])
def test_prefill_and_decode_are_causal_attention(isa, shape):
    rng = np.random.default_rng(sum(shape))
    a = Attention(isa, *shape, poison=True)
    n = 300 if isa == "scalar" else 700  # crosses one or two parts of 256 slots
    qkv = rows(rng, n, a)
    expected = a.truth(qkv)
    got = (
        a.run(qkv[: n - 40], 0)
        if n <= 512
        else np.concatenate([a.run(qkv[:512], 0), a.run(qkv[512 : n - 40], 512)])
    )
    np.testing.assert_allclose(got, expected[: n - 40], atol=3e-3)  # q is fp32, k and v are the cache's fp16
    at = n - 40
    for step in (1, 5, 2, 1, 16, 15):
        np.testing.assert_allclose(a.run(qkv[at : at + step], at), expected[at : at + step], atol=3e-3)
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


def test_every_isa_gives_the_same_bits():
    results = []
    for isa in ISAS:
        a = Attention(isa, 4, 2, 48, blocks=40)
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
