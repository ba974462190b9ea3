"""rows.cu and embed.cu under emulation, against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import bench, needs_device
from programs import FORMS, random_dense, random_linear

from tinychat.backends.cuda_pack import pack
from tinychat.kernels_cuda import linear

pytestmark = needs_device

RNG = np.random.default_rng(0)
WIDTHS = (1, 20, 64, 300, 777)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(name, grid, *arguments, out, dtype=np.float32):
    """`arguments`: arrays go to the device; ... is where the output goes."""
    b = bench()
    to = b.put(out)
    sent = [to if a is ... else b.put(a) if isinstance(a, np.ndarray) else a for a in arguments]
    b.run("rows.cu", name, grid, 256, *sent)
    return b.get(to, out.shape, dtype)


def poison(rows, ld):
    """What halves must be written over."""
    return np.full((rows, ld), 0x7E00, np.uint16)


def normed(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


@pytest.mark.parametrize("n", WIDTHS)
def test_norms(n):
    rows, ld = 5, linear.row_length(n)
    x, weight, to = floats(rows, n), floats(n), floats(rows, n)
    out = run("rms_norm", (rows,), x, weight, ..., n, ld, 1e-5, out=poison(rows, ld), dtype=np.float16)
    np.testing.assert_allclose(out[:, :n], normed(x, weight), rtol=2e-3, atol=1e-4)
    assert not out[:, n:].any()
    out = run("rms_norm_add", (rows,), x, weight, ..., n, 1e-5, out=to)
    np.testing.assert_allclose(out, to + normed(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "heads"), [(16, 4), (96, 1), (20, 3)])
def test_heads_are_normed_where_they_are(n, heads):
    x, weight = floats(3, 130), floats(n)
    out = run("norm_heads", (3, heads), ..., weight, n, 7, 130, 1e-5, out=x)
    expected = x.astype(np.float64)
    part = expected[:, 7 : 7 + n * heads].reshape(3, heads, n)
    expected[:, 7 : 7 + n * heads] = normed(part, weight).reshape(3, -1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", WIDTHS)
def test_gates(n):
    rows, ld = 3, linear.row_length(n)
    x = floats(rows, 2 * n) * 3
    a, b = x[:, :n].astype(np.float64), x[:, n:].astype(np.float64)
    gates = {
        "silu_mul": a / (1 + np.exp(-a)) * b,
        "gelu_mul": 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) * b,
    }
    for name, expected in gates.items():
        grid = -(-ld // 256), rows
        out = run(name, grid, x, ..., n, ld, out=poison(rows, ld), dtype=np.float16)
        np.testing.assert_allclose(out[:, :n], expected, rtol=2e-3, atol=1e-4)
        assert not out[:, n:].any()


@pytest.mark.parametrize("n", WIDTHS)
def test_squares_of_what_is_positive(n):
    rows, ld = 3, linear.row_length(n)
    x = floats(rows, n)
    out = run("relu_square", (-(-ld // 256), rows), x, ..., n, ld, out=poison(rows, ld), dtype=np.float16)
    np.testing.assert_allclose(out[:, :n], np.maximum(x, 0) ** 2, rtol=1e-3, atol=1e-6)
    assert not out[:, n:].any()


@pytest.mark.parametrize("share", [1, 4, 300])
def test_sigmoid_gates_of_one_or_several_neighbours(share):
    rows, n = 3, 300
    ld = linear.row_length(n)
    x, gate = floats(rows, ld).astype(np.float16), floats(rows, n // share)
    out = run("sigmoid_mul", (-(-n // 256), rows), gate, ..., n, ld, share, out=x, dtype=np.float16)
    gates = np.repeat(1 / (1 + np.exp(-gate.astype(np.float64))), share, axis=1)
    np.testing.assert_allclose(out[:, :n], x[:, :n] * gates, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(out[:, n:], x[:, n:])


def test_queries_and_the_gates_behind_each():
    b, rows, heads, size, rest = bench(), 3, 5, 24, 96
    x = floats(rows, 2 * heads * size + rest)
    to, gates = (b.put(np.full((rows, n), np.nan, np.float32)) for n in (heads * size + rest, heads * size))
    grid = -(-x.shape[1] // 256), rows
    b.run("rows.cu", "split_gates", grid, 256, b.put(x), to, gates, x.shape[1], 2 * heads * size, size)
    pairs = x[:, : 2 * heads * size].reshape(rows, heads, 2, size)
    expected = np.concatenate([pairs[:, :, 0].reshape(rows, -1), x[:, -rest:]], axis=1)
    np.testing.assert_array_equal(b.get(to, expected.shape), expected)
    np.testing.assert_array_equal(b.get(gates, (rows, heads * size)), pairs[:, :, 1].reshape(rows, -1))


@pytest.mark.parametrize("n", WIDTHS)
def test_halves_in_the_order_of_a_permutation(n):
    rows, ld = 3, linear.row_length(n)
    x, perm, grid = floats(rows, n), RNG.permutation(n).astype(np.int32), (-(-ld // 256), 3)
    for p in (None, perm):
        out = run("halve", grid, x, p, ..., n, ld, out=poison(rows, ld), dtype=np.float16)
        np.testing.assert_array_equal(
            out[:, :n], x.astype(np.float16)[:, perm if p is not None else slice(None)]
        )
        assert not out[:, n:].any()
    padded = np.zeros((rows, ld), np.float16)
    padded[:, :n] = x
    out = run("reorder", grid, padded, perm, ..., n, ld, out=poison(rows, ld), dtype=np.float16)
    np.testing.assert_array_equal(out[:, :n], padded[:, perm])
    assert not out[:, n:].any()


def test_what_no_half_holds_becomes_the_largest():
    x = np.array([[1e6, -1e6, 65504, 65519, -70000, np.inf]], np.float32)
    out = run("halve", (1, 1), x, None, ..., 6, 64, out=poison(1, 64), dtype=np.float16)
    np.testing.assert_array_equal(out[0, :6], [65504, -65504, 65504, 65504, -65504, 65504])


@pytest.mark.parametrize("kind", [*FORMS, "fp16", "bf16", "fp32"])
def test_embedding_rows(kind):
    n, k, b = 70, 320, bench()
    dense = kind in ("fp16", "bf16", "fp32")
    w = random_dense(RNG, kind, n, k) if dense else random_linear(RNG, kind, n, k, 32)
    shape, parts = pack(w)
    d = linear.upload(b.modules, shape, parts)
    ids = np.array([0, 69, 15, 16, 33, 8], np.int32)
    to = b.put(np.zeros((6, k), np.float32))
    b.run(
        "embed.cu", "embed", (2, 6), 256, d.codes, d.meta, d.zeros, b.put(ids), to, k, shape.stages,
        shape.group, shape.groups, 3.0, **shape.form.defines,
    )  # fmt: skip
    expected = 3 * w.dequantize().astype(np.float64)[ids]
    np.testing.assert_allclose(b.get(to, (6, k)), expected, rtol=1e-6, atol=2e-6)
