"""The algebra of weights: each sentence dequantizes to what its numbers mean and other libraries say."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from tinychat.network.weight_form import ROW, TABLES, Coded, Form, exact_halves
from tinychat.network.weights import DenseLinear, QuantizedLinear


def test_tables_are_the_floats_that_torch_knows():
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(TABLES["e4m3"], codes.view(torch.float8_e4m3fn).float().numpy())
    powers = Coded("e8m0", codes.numpy()[None]).floats()[0]
    np.testing.assert_array_equal(powers, codes.view(torch.float8_e8m0fnu).float().numpy())
    assert TABLES["e2m1"].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_nf4_is_the_quantiles_of_a_normal_distribution_as_its_paper_builds_them():
    ends = 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32: the paper's outermost quantiles
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(ends, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(ends, 0.5, 8)[:-1]]
    levels = np.sort([0, *above, *below]) / max(above)
    np.testing.assert_allclose(TABLES["nf4"], levels, atol=1e-6)
    assert TABLES["nf4"].dtype == np.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_of_every_width_by_hand(bits):
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    codes = np.array([[0, 1, middle, top] * 8], np.uint8)
    scale = np.array([[0.5, -2.0]], np.float16)
    symmetric = QuantizedLinear(codes, scale, bits=bits)
    first = [-middle / 2, (1 - middle) / 2, 0, (top - middle) / 2]
    second = [2.0 * middle, 2.0 * (middle - 1), 0, -2.0 * (top - middle)]
    assert symmetric.dequantize().tolist() == [first * 4 + second * 4]
    assert str(symmetric.form) == f"{bits}-bit, groups of 16, fp16 scale"
    zeros = QuantizedLinear(codes, scale, zeros=np.array([[0, 1]], np.uint8), bits=bits)
    first, second = [0, 0.5, middle / 2, top / 2], [2.0, 0, -2.0 * (middle - 1), -2.0 * (top - 1)]
    assert zeros.dequantize().tolist() == [first * 4 + second * 4]
    offsets = QuantizedLinear(codes, scale, offsets=np.array([[1.0, 0.25]], np.float32), bits=bits)
    first, second = [1, 1.5, 1 + middle / 2, 1 + top / 2], [0.25, -1.75, 0.25 - 2 * middle, 0.25 - 2 * top]
    assert offsets.dequantize().tolist() == [first * 4 + second * 4]
    assert str(offsets.form) == f"{bits}-bit, groups of 16, fp16 scale and fp32 offset"


@pytest.mark.parametrize("scale", ["fp16", "fp32", "int4", "int6", "int8", "e8m0", "e4m3"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_scales_of_every_kind_by_hand(scale, group):
    """Codes 8 + 1 are one; so a weight is its group's scale."""
    groups = 256 // group
    codes = np.full((2, 256), 9, np.uint8)
    stored, value = {
        "fp16": (np.full((2, groups), 1.5, np.float16), 1.5),
        "fp32": (np.full((2, groups), 1.5, np.float32), 1.5),
        "int4": (Coded("int4", np.full((2, groups), 15, np.uint8), np.full((2, 1), 0.5, np.float16)), 7.5),
        "int6": (Coded("int6", np.full((2, groups), -32, np.int8), np.full((2, 1), 0.5, np.float16)), -16),
        "int8": (Coded("int8", np.full((2, groups), -128, np.int8), np.full((2, 1), 2, np.float16)), -256),
        "e8m0": (Coded("e8m0", np.full((2, groups), 130, np.uint8)), 8),
        "e4m3": (Coded("e4m3", np.full((2, groups), 0x3C, np.uint8), np.full((1, 1), 3, np.float32)), 4.5),
    }[scale]
    w = QuantizedLinear(codes, stored)
    np.testing.assert_array_equal(w.dequantize(), np.full((2, 256), value, np.float32))
    assert (w.form.scale, w.form.group) == (scale, ROW if group == 256 else group)


def test_fp8_has_scales_of_a_tensor_a_channel_or_a_square():
    """OCP's e4m3: 0x38 is 1, 0x40 is 2, 0xB8 is -1."""
    codes = np.tile(np.array([0x38, 0x40, 0xB8, 0x00], np.uint8), (3, 4))
    rows = [1, 2, -1, 0] * 4
    tensor = QuantizedLinear(codes, np.array([[2.0]], np.float32), bits=8, table="e4m3", rows=3)
    assert tensor.dequantize().tolist() == [[2.0 * v for v in rows]] * 3
    assert str(tensor.form) == "8-bit e4m3, one group, fp32 scale"
    channel = QuantizedLinear(codes, np.array([[1], [2], [4]], np.float32), bits=8, table="e4m3")
    assert channel.dequantize().tolist() == [[s * v for v in rows] for s in (1.0, 2.0, 4.0)]
    assert str(channel.form) == "8-bit e4m3, one group a row, fp32 scale"
    square = QuantizedLinear(codes, np.array([[1, 2], [4, 8]], np.float32), bits=8, table="e4m3", rows=2)
    upper, lower = ([s * v for s in (a, b) for v in rows[:8]] for a, b in ((1.0, 2.0), (4.0, 8.0)))
    assert square.dequantize().tolist() == [upper, upper, lower]  # the last square is cut
    assert str(square.form) == "8-bit e4m3, blocks of 2 × 8, fp32 scale"
    assert square.form.n_bytes(3, 16) == 3 * 16 + 2 * 2 * 4


def test_int8_with_a_scale_for_each_row():
    w = QuantizedLinear(np.array([[-128, 127]], np.int8), np.array([[0.5]], np.float32), bits=8)
    assert w.dequantize().tolist() == [[-64.0, 63.5]]
    assert str(w.form) == "8-bit, one group a row, fp32 scale"


def test_columns_stay_with_their_inputs():
    codes = np.array([[8 + 1, 8 + 2, 8 + 3, 8 + 4]], np.uint8)
    w = QuantizedLinear(codes, np.ones((1, 2), np.float16), perm=np.array([2, 0, 3, 1], np.int32))
    assert w.dequantize().tolist() == [[2, 4, 1, 3]]


def test_floats_are_forms_too():
    assert str(DenseLinear(np.zeros((1, 4), np.uint16), bf16=True).form) == "bf16"
    assert Form(16, "bf16").n_bytes(3, 5) == 30
    assert str(DenseLinear(np.zeros((1, 4), np.float32)).form) == "fp32"


CODES, SCALES = np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float16)


@pytest.mark.parametrize(
    "say",
    [
        lambda: Form(7, "signed", 32, "fp16"),
        lambda: Form(4, "e4m3", 32, "fp16"),  # a table of 256
        lambda: Form(4, "nf3", 32, "fp16"),
        lambda: Form(4, "signed", 32, "fp8"),
        lambda: Form(4, "e2m1", 32, "fp16", "zero"),
        lambda: Form(4, "signed", 32, "none"),
        lambda: Form(16, "fp32"),
        lambda: Form(32, "fp32", 32, "fp16"),
        lambda: QuantizedLinear(CODES, np.ones((2, 3), np.float16)),
        lambda: QuantizedLinear(CODES, np.ones((3, 1), np.float16)),
        lambda: QuantizedLinear(CODES, SCALES, zeros=CODES[:, :1], offsets=SCALES),
        lambda: QuantizedLinear(CODES, SCALES, zeros=CODES[:, :2]),
        lambda: QuantizedLinear(CODES.view(np.int8), SCALES),  # int8 codes are of 8 bits
        lambda: QuantizedLinear(CODES, SCALES.astype(np.float64)),
        lambda: Coded("int6", CODES),
        lambda: Coded("int6", CODES, np.ones((2, 1), np.float32)),
        lambda: Coded("e8m0", CODES, SCALES),
        lambda: Coded("int6", CODES, np.ones((2, 5), np.float16)),
    ],
)
def test_what_makes_no_sense_cannot_be_said(say):
    with pytest.raises(ValueError, match=r"."):
        say()


def test_halves_are_exact_or_none():
    assert exact_halves(np.array([[0.5]], np.float32)).dtype == np.float16
    assert exact_halves(np.array([[0.1]], np.float32)) is None
    assert exact_halves(np.array([[1e6]], np.float32)) is None
    assert exact_halves(Coded("e8m0", np.array([[130]], np.uint8))).tolist() == [[8]]
