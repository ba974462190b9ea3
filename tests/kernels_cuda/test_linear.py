"""linear.cu under emulation: every form of weight, group sizes, tails, 1 to 33 rows, independence of rows."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import bench, needs_device, needs_emulation
from programs import FORMS, random_dense, random_linear

from tinychat.backends.cuda_pack import pack
from tinychat.kernels_cuda import layout, linear

pytestmark = needs_device

DENSE = ("fp16", "bf16", "fp32")
KINDS = [*FORMS, *DENSE]


def random_weight(rng, kind, n, k, group):
    if kind in DENSE:
        return random_dense(rng, kind, n, k, bias=True)
    return random_linear(rng, kind, n, k, 32 if kind.startswith("int8") else group, bias=True)


def halves(rng, rows, k):
    x = np.zeros((rows, linear.row_length(k)), np.float16)
    x[:, :k] = rng.normal(size=(rows, k))
    return x


def run(w, x, add=None, **options):
    """float32 [rows, n], for halves x."""
    b = bench()
    rows, n = len(x), w.shape[0]
    y = b.put(np.full((rows, n), np.nan, np.float32) if add is None else add)
    device = linear.upload(b.modules, *pack(w))
    linear.launch(b.modules, device, b.put(x), y, rows, n, add=add is not None, **options)
    return b.get(y, (rows, n))


def truth(w, x):
    """float64, from the halves that the kernel reads."""
    k = w.shape[1]
    return x[:, :k].astype(np.float64) @ w.dequantize().astype(np.float64).T + w.bias


# Groups of 4-bit weights; int8 has 32, dense weights none.
GROUPS = [(kind, g) for kind in KINDS for g in (32, 64, 96, 128, "row")]
GROUPS = [(k, g) for k, g in GROUPS if g == 32 or not (k in DENSE or k.startswith("int8"))]


@pytest.mark.parametrize(("kind", "group"), GROUPS)
def test_products_are_those_of_the_dequantized_weight(kind, group):
    rng = np.random.default_rng([KINDS.index(kind), 0 if group == "row" else group])
    step = 64 if group == "row" else group
    # Every number of rows from 1 to 33 is met with some weight.
    for rows in range(1 + GROUPS.index((kind, group)) % 11, 34, 11):
        n, k = int(rng.integers(1, 90)), step * int(rng.integers(1, 12))
        w, x = random_weight(rng, kind, n, k, k if group == "row" else group), halves(rng, rows, k)
        expected = truth(w, x)
        # Codes are exact, sums are fp32: what is left is the rounding of a few hundred additions.
        bound = 2e-6 * (np.abs(x[:, :k]).astype(np.float64) @ np.abs(w.dequantize()).T.astype(np.float64) + 1)
        assert (np.abs(run(w, x) - expected) < bound).all(), (rows, n, k)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    w, x = random_weight(rng, kind, 50, 704, 64), halves(rng, 33, 704)
    whole = run(w, x)
    for rows in range(1, 17):
        first = (5 * rows) % (33 - rows)
        np.testing.assert_array_equal(run(w, x[first : first + rows]), whole[first : first + rows])

    more = ["linear_1x64"] if kind == "fp32" else ["linear_2x8", "linear_2x16", "linear_2x64"]
    for name in ("linear_1x8", "linear_1x16", "linear_8x128", *more):
        np.testing.assert_array_equal(run(w, x, name=name), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_have_the_bits_of_few(kind):
    """Several blocks of 128 outputs and rows, the last of them partial; fewer stages than warps."""
    rng = np.random.default_rng(KINDS.index(kind))
    w, x = random_weight(rng, kind, 150, 192, 64), halves(rng, 140, 192)
    residual = rng.normal(size=(140, 150)).astype(np.float32)
    got = run(w, x, add=residual, name="linear_8x128")
    for first in (0, 60, 124):
        part = slice(first, first + 16)
        np.testing.assert_array_equal(run(w, x[part], add=residual[part]), got[part])


def test_a_variant_leaves_no_processor_idle_that_it_need_not():
    def chosen(n, rows, kind="zeros", processors=132):
        shape, _ = pack(random_weight(np.random.default_rng(0), kind, n, 64, 64))
        return linear.variant(shape, rows, processors)

    assert chosen(4096, 1) == ("linear_1x8", (1, 256))
    assert chosen(4096, 1, processors=24) == ("linear_2x8", (1, 128))
    assert chosen(4096, 16) == ("linear_1x16", (1, 256))
    assert chosen(4096, 33) == ("linear_2x64", (1, 128))
    assert chosen(4096, 512) == ("linear_8x128", (4, 32))
    assert chosen(1024, 512) == ("linear_2x64", (8, 32))
    assert chosen(1024, 512, "fp32") == ("linear_1x64", (8, 64))


def test_the_result_can_be_added_to_the_residual():
    rng = np.random.default_rng(0)
    w, x = random_weight(rng, "zeros", 40, 128, 64), halves(rng, 3, 128)
    residual = rng.normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_array_equal(run(w, x, add=residual), residual + run(w, x))


def test_logits_are_scaled_and_capped():
    rng = np.random.default_rng(0)
    w, x = random_weight(rng, "int8", 40, 128, 32), halves(rng, 3, 128)
    expected = 2.0 * np.tanh(0.5 * run(w, x) / 2.0)
    np.testing.assert_allclose(run(w, x, scale=0.5, cap=2.0), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sizes_are_the_promised_ones(kind):
    rng = np.random.default_rng(0)
    for n, k in ((5, 96), (16, 64), (33, 288)):
        shape, parts = pack(random_weight(rng, kind, n, k, 32))
        sizes = tuple(0 if parts[p] is None else parts[p].nbytes for p in ("codes", "meta", "zeros"))
        assert sizes == shape.sizes


def test_a_large_weight_is_packed_in_bands():
    rng = np.random.default_rng(0)
    w, x = random_weight(rng, "symmetric", layout.BAND + 40, 64, 64), halves(rng, 1, 64)
    np.testing.assert_allclose(run(w, x), truth(w, x), atol=1e-4)


@needs_emulation
@pytest.mark.parametrize("kind", KINDS)
def test_warps_may_run_in_any_order(kind, monkeypatch):
    """No barrier is missing: with warps run from the last to the first, the bits are the same."""
    rng = np.random.default_rng(0)
    w, x = random_weight(rng, kind, 50, 640, 64), halves(rng, 20, 640)
    expected = run(w, x)
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal(run(w, x), expected)
