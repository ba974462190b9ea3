"""linear.cu and embed.cu under emulation for the forms of files: codes of 2 to 8 bits and tables, coded
scales, groups of 16. A form takes a second to compile, so that most of them are slow.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from emulation import bench, needs_device, needs_emulation
from programs import CODED, random_coded

from tinychat.backends.cuda_pack import BESIDES, CODES, KERNELS, _joined, pack
from tinychat.backends.exact_form import ExactForm
from tinychat.kernels_cuda import layout, linear
from tinychat.network.weight_form import Coded
from tinychat.network.weights import QuantizedLinear

pytestmark = needs_device

# Forms that between them have every plane, a table, zeros, groups of 16 and 32, most kinds of coded scales.
USUAL = ("q4_k", "q6_k", "3-bit", "nvfp4")
FLOATS = ("nf4", "e4m3")  # codes that are floats, with one fp32 for each 64 inputs
KINDS = [k if k in USUAL else pytest.param(k, marks=pytest.mark.slow) for k in (*CODED, *FLOATS)]
MADE_UP = (" ", "-", "mixed", *FLOATS)  # in the names of the others, which no file is known to have


def weight(kind: str, n: int, k: int) -> QuantizedLinear:
    rng = np.random.default_rng(zlib.crc32(f"{kind} {n} {k}".encode()))
    if kind not in FLOATS:
        return random_coded(rng, kind, n, k)
    codes = rng.integers(0, 16 if kind == "nf4" else 256, (n, k), dtype=np.uint8)
    if kind == "e4m3":
        codes[codes & 127 == 127] = 1  # no number; 1 is the smallest there is
    scales = rng.uniform(0.01, 0.02, (n, k // 64)).astype(np.float32)
    return QuantizedLinear(codes, scales, bits=4 if kind == "nf4" else 8, table=kind)


def widths(kind: str) -> list[int]:
    """Whole blocks of 256 inputs; where no integer has an fp16 for each, a width that ends within a stage."""
    whole = kind.startswith(("q2", "q3", "q4", "q5_k", "q6", "iq4_xs", "8-bit int6", "tq2", "mixed"))
    group = 64 if kind in FLOATS else CODED[kind][2]
    return [768] if whole else [768, group * 11 if group >= 32 else 352]


def halves(rng, rows, k):
    x = np.zeros((rows, linear.row_length(k)), np.float16)
    x[:, :k] = rng.normal(size=(rows, k))
    return x


def run(packed, x, name=None):
    """float32 [rows, n], for halves x."""
    b, rows, n = bench(), len(x), packed[0].n
    y = b.put(np.full((rows, n), np.nan, np.float32))
    linear.launch(b.modules, linear.upload(b.modules, *packed), b.put(x), y, rows, n, name=name)
    return b.get(y, (rows, n))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weight(kind):
    """So are rows of the embedding; and a row has the same bits in every variant and any company."""
    for k in widths(kind):
        rng, w = np.random.default_rng(k), weight(kind, 53, k)
        assert not ExactForm.of(w, KERNELS).rounded
        packed, x, true = pack(w), halves(rng, 19, k), w.dequantize().astype(np.float64)
        got = run(packed, x)
        bound = 2e-6 * (np.abs(x[:, :k]).astype(np.float64) @ np.abs(true).T + 1)
        assert (np.abs(got - x[:, :k].astype(np.float64) @ true.T) < bound).all()

        names = ["linear_1x8", "linear_2x64", "linear_8x128"]
        for name in [*names, "linear_2x8"] if packed[0].form.deep else names:
            np.testing.assert_array_equal(run(packed, x, name), got)
        np.testing.assert_array_equal(run(packed, x[3:5]), got[3:5])

        ids = np.array([0, 52, 15, 16, 33, 8], np.int32)
        rows = embedded(packed, ids)
        np.testing.assert_allclose(rows, 3 * true[ids], rtol=1e-6, atol=1e-6 * np.abs(true).max())


def embedded(packed, ids):
    """3 × these rows of the embedding."""
    b, s = bench(), packed[0]
    d, to = linear.upload(b.modules, *packed), b.put(np.zeros((len(ids), s.k), np.float32))
    b.run(
        "embed.cu", "embed", (-(-s.k // 256), len(ids)), 256, d.codes, d.meta, d.zeros, b.put(ids), to, s.k,
        s.stages, s.group, s.groups, 3.0, **s.form.defines,
    )  # fmt: skip
    return b.get(to, (len(ids), s.k))


# Of 8 bits and of tables no zero points are stored.
ALL = [(c, b) for c in CODES for b in BESIDES if b[1] != "zero" or (c.isdigit() and c != "8")]


@pytest.mark.slow
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(("codes", "beside"), ALL, ids=["-".join([c, *b]) for c, b in ALL])
def test_any_codes_run_beside_any_scales(codes, beside, group, monkeypatch):
    bits = int(codes) if codes.isdigit() else layout.TABLES[codes.upper()]
    scale, offset = beside[0], None if beside[1] == "none" else beside[1]
    signed = " signed" if scale == "int6" and offset is None else ""
    table = None if codes.isdigit() else codes
    monkeypatch.setitem(CODED, "any", (bits, table, group, scale + signed, offset))
    w = random_coded(np.random.default_rng(0), "any", 37, 512)
    if table == "e4m3":
        w.codes[w.codes & 127 == 127] = 1
    if offset == "zero":
        w.zeros[:] &= 15
    packed, x, true = pack(w), halves(np.random.default_rng(1), 3, 512), w.dequantize().astype(np.float64)
    word = "_".join(b for b in beside if b != "none").upper()
    assert packed[0].form.beside == ("ZERO" if offset == "zero" else word)
    got = run(packed, x)
    bound = 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(true).T + 1)
    assert (np.abs(got - x.astype(np.float64) @ true.T) < bound).all()
    np.testing.assert_array_equal(run(packed, x, "linear_8x128"), got)


@pytest.mark.parametrize("kind", [k for k in CODED if not any(word in k for word in MADE_UP)])
def test_no_form_takes_two_percent_more_than_in_its_file(kind):
    w = weight(kind, 64, 1024)
    assert sum(sizes(pack(w)[1])) <= 1.02 * w.form.n_bytes(*w.shape)


def sizes(parts):
    return tuple(0 if parts[p] is None else parts[p].nbytes for p in ("codes", "meta", "zeros"))


@pytest.mark.parametrize("kind", [*CODED, *FLOATS])
def test_packed_sizes_are_the_promised_ones(kind):
    for n in (5, 16, 33):
        shape, parts = pack(weight(kind, n, 768))
        assert sizes(parts) == shape.sizes


def test_linears_of_one_form_are_joined_with_what_stands_beside_them():
    above, below = weight("q4_k", 32, 256), weight("q4_k", 21, 256)
    ((shape, parts),) = _joined([pack(above), pack(below)])
    x = halves(np.random.default_rng(0), 2, 256)
    got = run((shape, parts), x)
    np.testing.assert_array_equal(got, np.concatenate([run(pack(above), x), run(pack(below), x)], axis=1))


def test_signs_that_kernels_do_not_expect_become_floats_of_the_same_value():
    w = weight("q4_k", 8, 256)
    signed = Coded("int6", w.scales.codes.astype(np.int8) - np.int8(32), w.scales.times)
    shape, parts = pack(QuantizedLinear(w.codes, signed, offsets=w.offsets))
    assert shape.form.beside == "FP32_FP32"
    # group, g, scale or offset, which row of eight
    scales = parts["meta"].view(np.float32).reshape(8, 8, 2, 2)[:, :, 0, 0].T
    np.testing.assert_array_equal(scales, signed.floats())


@needs_emulation
@pytest.mark.parametrize("kind", ["q6_k"])
def test_warps_may_run_in_any_order(kind, monkeypatch):
    packed, x = pack(weight(kind, 53, 768)), halves(np.random.default_rng(0), 19, 768)
    expected = [run(packed, x), run(packed, x, "linear_8x128")]
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal([run(packed, x), run(packed, x, "linear_8x128")], expected)
