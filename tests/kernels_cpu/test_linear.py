"""Linears: every form, every ISA, every row count, against float64 on the dequantized weights."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
from programs import (
    BEST,
    CODED,
    FLOAT_CODES,
    FORMS,
    ISAS,
    quantize_rows,
    random_coded,
    random_dense,
    random_linear,
    run_linear,
)

from tinychat.backends.cpu_pack import KERNELS, pack
from tinychat.backends.exact_form import ExactForm
from tinychat.network.weight_form import TABLES
from tinychat.network.weights import QuantizedLinear

# (out, in, group): tails of the 16-row tile, every group, whole rows, widths that are no power of two
SHAPES = [
    (16, 64, 32),
    (17, 128, 64),
    (40, 256, 128),
    (1, 96, 96),
    (33, 576, 64),
    (50, 576, 576),
    (100, 288, 32),
    (16, 1024, 1024),
]


def activations(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """Rows with outliers, a zero group and a row of zeros, as networks make them."""
    x = rng.normal(size=(rows, k)).astype(np.float32)
    x[:, rng.integers(0, k, 3)] *= 50
    x[0, :32] = 0
    if rows > 1:
        x[1] = 0
    return x


def truth(w, x: np.ndarray, act_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 result for the activations as quantized, and the size of its terms."""
    weight = w.dequantize().astype(np.float64)
    if w.__class__.__name__ != "DenseLinear" and w.table not in FLOAT_CODES:
        x = quantize_rows(x if getattr(w, "perm", None) is None else x[:, w.perm], act_bits)
        if getattr(w, "perm", None) is not None:
            weight = weight[:, w.perm]
    y = x.astype(np.float64) @ weight.T
    size = np.abs(x).astype(np.float64) @ np.abs(weight).T
    if w.bias is not None:
        y, size = y + w.bias, size + np.abs(w.bias)
    return y, size


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_linear_is_the_dequantized_one_on_quantized_rows(form, act_bits):
    rng = np.random.default_rng(zlib.crc32(form.encode()))
    for i, (n, k, group) in enumerate(SHAPES):
        if form.startswith("int8") and group != 32:
            group = 32
        w = random_linear(rng, form, n, k, group, bias=i % 2 == 1)
        rows = int(rng.integers(1, 34))
        x = activations(rng, rows, k)
        expected, size = truth(w, x, act_bits)
        for isa in ISAS:
            got = run_linear([pack(w)], x, isa=isa, act_bits=act_bits)
            # fp32 sums over groups, and an activation that lies between two integers may round either way.
            slack = 3e-6 * size + np.abs(x).max() / (127 if act_bits == 8 else 32767) * 1e-4 + 1e-6
            assert (np.abs(got - expected) <= slack).all(), (isa, n, k, group, np.abs(got - expected).max())


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("form", CODED)
def test_every_form_runs_as_it_is_stored(form, act_bits):
    rng = np.random.default_rng(zlib.crc32(form.encode()))
    # tails of the tile, and of what is opened at once; odd numbers of groups where there are no integers
    shapes = [(17, 256), (40, 768), (16, 2304)]
    if not form.startswith(("q2", "q3", "q4", "q5_k", "q6", "iq4_xs", "8-bit int6", "tq2", "mixed")):
        shapes += [(33, 576), (1, CODED[form][2] * (2 if CODED[form][2] < 32 else 3))]
    for i, (n, k) in enumerate((n, k) for n, k in shapes if k % CODED[form][2] == 0 or form == "6-bit"):
        k = k if k % CODED[form][2] == 0 else k * 3
        w = random_coded(rng, form, n, k, bias=i % 2 == 1)
        assert not ExactForm.of(w, KERNELS).rounded
        for rows in (int(rng.integers(1, 16)), int(rng.integers(17, 80))):  # codes are opened for many
            x = activations(rng, rows, k)
            expected, size = truth(w, x, act_bits)
            for isa in ISAS:
                got = run_linear([pack(w)], x, isa=isa, act_bits=act_bits)
                # scales of an unsigned form and their offsets cancel: what fp32 sums lose follows the codes
                slack = 3e-6 * size * (3 if w.bits < 8 else 1)
                slack = slack + np.abs(x).max() / (127 if act_bits == 8 else 32767) * 1e-4 + 1e-6
                worst = np.abs(got - expected).max()
                assert (np.abs(got - expected) <= slack).all(), (isa, n, k, rows, worst)


@pytest.mark.parametrize("table", FLOAT_CODES)
def test_every_float_code_is_its_value_to_the_bit(table):
    """One input at a time; few rows and many."""
    codes = np.flatnonzero(~np.isnan(TABLES[table])).astype(np.uint8)
    codes = np.resize(codes, 16 * 256).reshape(16, 256)
    w = QuantizedLinear(codes, np.ones((16, 1), np.float32), bits=8 if table == "e4m3" else 4, table=table)
    x = np.eye(256, dtype=np.float32)
    for isa in ISAS:
        np.testing.assert_array_equal(run_linear([pack(w)], x, isa=isa).T, TABLES[table][codes])
        few = [run_linear([pack(w)], x[i : i + 5], isa=isa) for i in range(0, 256, 5)]
        np.testing.assert_array_equal(np.concatenate(few).T, TABLES[table][codes])


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_dense_linear_is_the_stored_weight(kind):
    rng = np.random.default_rng(7)
    for n, k in [(16, 32), (17, 33), (1, 8), (40, 100), (64, 7)]:
        w = random_dense(rng, kind, n, k, bias=n > 16)
        x = rng.normal(size=(int(rng.integers(1, 20)), k)).astype(np.float32)
        expected, size = truth(w, x, 8)
        for isa in ISAS:
            got = run_linear([pack(w)], x, isa=isa)
            assert (np.abs(got - expected) <= 3e-6 * size + 1e-7).all(), (isa, n, k)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_every_isa_gives_the_bits_of_the_scalar_one(form, act_bits):
    rng = np.random.default_rng(11)
    for n, k, group in SHAPES:
        w = pack(random_linear(rng, form, n, k, 32 if form.startswith("int8") else group))
        x = activations(rng, 9, k)
        expected = run_linear([w], x, isa="scalar", act_bits=act_bits)
        for isa in ISAS[:-1]:
            np.testing.assert_array_equal(run_linear([w], x, isa=isa, act_bits=act_bits), expected)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("form", CODED)
def test_every_form_gives_the_bits_of_the_scalar_kernels_for_any_rows(form, act_bits):
    """Rows alone and with others, a few and so many that codes are opened first."""
    rng = np.random.default_rng(12)
    k = 1536 if CODED[form][2] == 96 else 1280
    w = pack(random_coded(rng, form, 50, k))
    x = activations(rng, 20, k)
    expected = run_linear([w], x[:17], isa="scalar", act_bits=act_bits)
    for isa in ISAS[:-1]:
        for rows in (*range(1, 10), 16, 17, 20):
            start = int(rng.integers(0, 18 - min(rows, 17)))
            got = run_linear([w], x[start : start + rows], isa=isa, act_bits=act_bits)
            n = min(rows, 17 - start)
            np.testing.assert_array_equal(got[:n], expected[start : start + n])
    few = run_linear([w], x[3:5], isa="scalar", act_bits=act_bits)
    np.testing.assert_array_equal(few, expected[3:5])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("form", ["zeros", "offsets", "int8", "fp16"])
def test_a_row_does_not_depend_on_the_rows_beside_it(form, act_bits, isa):
    rng = np.random.default_rng(3)
    n, k = 80, 576
    w = pack(random_dense(rng, form, n, k) if form == "fp16" else random_linear(rng, form, n, k, 32))
    x = activations(rng, 33, k)
    alone = np.concatenate([run_linear([w], x[i : i + 1], isa=isa, act_bits=act_bits) for i in range(33)])
    for rows in range(2, 34):
        start = int(rng.integers(0, 34 - rows))
        got = run_linear([w], x[start : start + rows], isa=isa, act_bits=act_bits)
        np.testing.assert_array_equal(got, alone[start : start + rows])


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 200])
def test_threads_do_not_change_a_bit(rows):
    rng = np.random.default_rng(4)
    w = pack(random_linear(rng, "zeros", 700, 256, 64))
    x = activations(rng, rows, 256)
    expected = run_linear([w], x, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(run_linear([w], x, threads=threads), expected)


def test_stacked_linears_of_different_kinds_stand_side_by_side():
    rng = np.random.default_rng(5)
    k = 128
    parts = [
        random_linear(rng, "zeros", 48, k, 64, bias=True),
        random_linear(rng, "int8", 20, k, 32),
        random_dense(rng, "fp32", 9, k, bias=True),
        random_linear(rng, "symmetric", 33, k, 128),
    ]
    x = activations(rng, 6, k)
    got = run_linear([pack(w) for w in parts], x)
    each = np.concatenate([run_linear([pack(w)], x) for w in parts], axis=1)
    np.testing.assert_array_equal(got, each)


def test_the_residual_is_added_once():
    rng = np.random.default_rng(6)
    w = random_linear(rng, "zeros", 50, 64, 32, bias=True)
    x, residual = activations(rng, 7, 64), rng.normal(size=(7, 50)).astype(np.float32)
    plain = run_linear([pack(w)], x)
    np.testing.assert_array_equal(run_linear([pack(w)], x, residual=residual), plain + residual)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_permuted_inputs(act_bits):
    rng = np.random.default_rng(8)
    w = random_linear(rng, "zeros", 30, 256, 64)
    w = dataclasses.replace(w, perm=rng.permutation(256).astype(np.int32))
    x = activations(rng, 5, 256)
    expected, size = truth(w, x, act_bits)
    np.testing.assert_allclose(run_linear([pack(w)], x, act_bits=act_bits), expected, atol=3e-6 * size.max())
    if act_bits == 16:  # and against the definition, which knows nothing of the order of columns
        exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
        np.testing.assert_allclose(run_linear([pack(w)], x, act_bits=16), exact, atol=1e-4 * size.max())


def test_groups_that_are_no_whole_activation_groups_run_dense():
    rng = np.random.default_rng(9)
    for k, group in [(40, 40), (48, 16), (72, 8), (96, 48)]:
        w = random_linear(rng, "zeros", 20, k, group)
        x = rng.normal(size=(3, k)).astype(np.float32)
        exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
        np.testing.assert_allclose(run_linear([pack(w)], x), exact, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_visible_and_in_its_row(bad, isa):
    rng = np.random.default_rng(10)
    w = pack(random_linear(rng, "zeros", 32, 128, 64))
    x = activations(rng, 5, 128)
    clean = run_linear([w], x, isa=isa)
    x[2, 100] = bad
    got = run_linear([w], x, isa=isa)
    assert not np.isfinite(got[2]).any()
    keep = [0, 1, 3, 4]
    np.testing.assert_array_equal(got[keep], clean[keep])


def test_tiny_and_huge_activations():
    rng = np.random.default_rng(12)
    w = random_linear(rng, "zeros", 16, 64, 32)
    for scale in (1e-38, 1e-20, 1e30):
        x = (rng.normal(size=(2, 64)) * scale).astype(np.float32)
        got = run_linear([pack(w)], x, isa=BEST, act_bits=16)
        exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
        assert np.abs(got - exact).max() <= max(1e-3 * np.abs(exact).max(), 1e-30)
