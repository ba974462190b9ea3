"""The algebra of weights: each sentence dequantizes to what its numbers mean and other libraries say."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

from tinychat.formats.gguf_file import FORMS
from tinychat.network.weight_form import ROW, TABLES, Coded, Form, exact_halves
from tinychat.network.weights import DenseLinear, QuantizedLinear

N, BLOCKS = 3, 2


def half(raw: np.ndarray) -> np.ndarray:
    """uint8 [N, blocks, 2 m] to float16 [N, blocks m]."""
    return np.ascontiguousarray(raw).view("<f2").reshape(N, -1)


def fields(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Codes of `bits`, [N, codes]: the lowest fields of a run of `width` bytes, then the next ones, …"""
    runs = packed.reshape(N, -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(N, -1)


def q4_0(b):
    return QuantizedLinear(fields(b[..., 2:], 16, 4), half(b[..., :2]))


def q4_1(b):
    return QuantizedLinear(fields(b[..., 4:], 16, 4), half(b[..., :2]), offsets=half(b[..., 2:4]))


def fifth_bits(b: np.ndarray) -> np.ndarray:
    """Bit i of a little-endian word of 32 is for code i."""
    return np.unpackbits(b, axis=-1, bitorder="little").reshape(N, -1) << 4


def q5_0(b):
    codes = fields(b[..., 6:], 16, 4) | fifth_bits(b[..., 2:6])
    return QuantizedLinear(codes, half(b[..., :2]), bits=5)


def q5_1(b):
    codes = fields(b[..., 8:], 16, 4) | fifth_bits(b[..., 4:8])
    return QuantizedLinear(codes, half(b[..., :2]), offsets=half(b[..., 2:4]), bits=5)


def q8_0(b):
    codes = np.ascontiguousarray(b[..., 2:]).view(np.int8).reshape(N, -1)
    return QuantizedLinear(codes, half(b[..., :2]), bits=8)


def q2_k(b):
    beside = b[..., :16].reshape(N, -1)
    scales = Coded("int4", beside & 15, half(b[..., 80:82]))
    offsets = Coded("int4", beside >> 4, -half(b[..., 82:84]))
    return QuantizedLinear(fields(b[..., 16:80], 32, 2), scales, offsets=offsets, bits=2)


def q3_k(b):
    low, high = fields(b[..., 96:104], 8, 4), fields(b[..., 104:108], 4, 2)
    scales = (low | high << 4).astype(np.int8) - np.int8(32)
    # a run of 32 bytes holds two bits of 128 codes; the third bits of all 256 lie in 32 bytes
    codes = fields(b[..., 32:96], 32, 2) | fields(b[..., :32], 32, 1) << 2
    return QuantizedLinear(codes, Coded("int6", scales, half(b[..., 108:110])), bits=3)


def six_bits(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima in 12 bytes: [N, 8 blocks] each."""
    a, m, top = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    scales = np.concatenate([a & 63, (top & 15) | (a >> 6) << 4], axis=-1)
    return scales.reshape(N, -1), np.concatenate([m & 63, top >> 4 | (m >> 6) << 4], axis=-1).reshape(N, -1)


def q4_k(b):
    scales, minima = six_bits(b[..., 4:16])
    return QuantizedLinear(
        fields(b[..., 16:], 32, 4),
        Coded("int6", scales, half(b[..., :2])),
        offsets=Coded("int6", minima, -half(b[..., 2:4])),
    )


def q5_k(b):
    scales, minima = six_bits(b[..., 4:16])
    return QuantizedLinear(
        fields(b[..., 48:], 32, 4) | fields(b[..., 16:48], 32, 1) << 4,
        Coded("int6", scales, half(b[..., :2])),
        offsets=Coded("int6", minima, -half(b[..., 2:4])),
        bits=5,
    )


def q6_k(b):
    codes = fields(b[..., :128], 64, 4) | fields(b[..., 128:192], 32, 2) << 4
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8).reshape(N, -1)
    return QuantizedLinear(codes, Coded("int8", scales, half(b[..., 208:210])), bits=6)


def iq4_nl(b):
    return QuantizedLinear(fields(b[..., 2:], 16, 4), half(b[..., :2]), table="iq4_nl")


def iq4_xs(b):
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(N, -1, 8)
    high = np.ascontiguousarray(b[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high.astype(np.uint8) << 4).astype(np.int8).reshape(N, -1) - np.int8(32)
    codes = fields(b[..., 8:], 16, 4)
    return QuantizedLinear(codes, Coded("int6", scales, half(b[..., :2])), table="iq4_nl")


def mxfp4(b):
    return QuantizedLinear(fields(b[..., 1:], 16, 4), Coded("e8m0", b[..., 0]), table="e2m1")


def nvfp4(b):
    scales = Coded("e4m3", b[..., :4].reshape(N, -1), np.ones((1, 1), np.float32))
    return QuantizedLinear(fields(b[..., 4:], 8, 4), scales, table="e2m1")


BLOCK_FORMATS = {
    Kind.Q4_0: (q4_0, "4-bit, groups of 32, fp16 scale"),
    Kind.Q4_1: (q4_1, "4-bit, groups of 32, fp16 scale and offset"),
    Kind.Q5_0: (q5_0, "5-bit, groups of 32, fp16 scale"),
    Kind.Q5_1: (q5_1, "5-bit, groups of 32, fp16 scale and offset"),
    Kind.Q8_0: (q8_0, "8-bit, groups of 32, fp16 scale"),
    Kind.Q2_K: (q2_k, "2-bit, groups of 16, 4-bit scale and offset × fp16"),
    Kind.Q3_K: (q3_k, "3-bit, groups of 16, 6-bit scale × fp16"),
    Kind.Q4_K: (q4_k, "4-bit, groups of 32, 6-bit scale and offset × fp16"),
    Kind.Q5_K: (q5_k, "5-bit, groups of 32, 6-bit scale and offset × fp16"),
    Kind.Q6_K: (q6_k, "6-bit, groups of 16, 8-bit scale × fp16"),
    Kind.IQ4_NL: (iq4_nl, "4-bit iq4_nl, groups of 32, fp16 scale"),
    Kind.IQ4_XS: (iq4_xs, "4-bit iq4_nl, groups of 32, 6-bit scale × fp16"),
    Kind.MXFP4: (mxfp4, "4-bit e2m1, groups of 32, e8m0 scale"),
    Kind.NVFP4: (nvfp4, "4-bit e2m1, groups of 16, e4m3 scale × fp32"),
}
HALVES = {  # where a block's halves lie: random bytes there would be infinities
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q6_K: (208,),
    Kind.MXFP4: (),
    Kind.NVFP4: (),
} | dict.fromkeys((Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K), (0, 2))


def random_blocks(kind: Kind) -> np.ndarray:
    """Any bytes, with finite scales: uint8 [N, blocks, bytes]."""
    rng = np.random.default_rng(kind.value)
    blocks = rng.integers(0, 256, (N, BLOCKS, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        values = rng.normal(size=(N, BLOCKS, 1)).astype(np.float16)
        blocks[..., at : at + 2] = values.view(np.uint8)
    if kind == Kind.MXFP4:
        blocks[..., 0] = rng.integers(0, 240, (N, BLOCKS))  # 255 is no number
    if kind == Kind.NVFP4:
        blocks[..., :4] = rng.integers(0, 127, (N, BLOCKS, 4))  # unsigned, and 127 is no number
    return blocks


@pytest.mark.parametrize("kind", BLOCK_FORMATS, ids=lambda k: k.name)
def test_block_formats_can_be_said_and_mean_what_the_gguf_package_says(kind):
    unpack, said = BLOCK_FORMATS[kind]
    blocks = random_blocks(kind)
    w = unpack(blocks)
    assert str(w.form) == said
    assert w.form == FORMS[kind.name]  # what the reader says of such a tensor without reading it
    np.testing.assert_array_equal(w.dequantize(), quants.dequantize(blocks.reshape(N, -1), kind))
    size, n_bytes = GGML_QUANT_SIZES[kind]
    assert w.shape == (N, BLOCKS * size)
    of_the_whole = 4 if kind == Kind.NVFP4 else 0  # the fp32, which a GGUF keeps in another tensor
    assert w.form.n_bytes(*w.shape) == N * BLOCKS * n_bytes + of_the_whole


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
