"""Every quantized type of GGUF as codes and scales: what it means is what the gguf package dequantizes."""

from __future__ import annotations

import numpy as np
import pytest
from ggml_blocks import HALVES, Kind, random_blocks
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

from tinychat.formats.gguf_blocks import PIECE, UNPACK
from tinychat.formats.gguf_file import FORMS, TYPES
from tinychat.network.weight_form import is_finite

SAID = {
    Kind.Q4_0: "4-bit, groups of 32, fp16 scale",
    Kind.Q4_1: "4-bit, groups of 32, fp16 scale and offset",
    Kind.Q5_0: "5-bit, groups of 32, fp16 scale",
    Kind.Q5_1: "5-bit, groups of 32, fp16 scale and offset",
    Kind.Q8_0: "8-bit, groups of 32, fp16 scale",
    Kind.Q2_K: "2-bit, groups of 16, 4-bit scale and offset × fp16",
    Kind.Q3_K: "3-bit, groups of 16, 6-bit scale × fp16",
    Kind.Q4_K: "4-bit, groups of 32, 6-bit scale and offset × fp16",
    Kind.Q5_K: "5-bit, groups of 32, 6-bit scale and offset × fp16",
    Kind.Q6_K: "6-bit, groups of 16, 8-bit scale × fp16",
    Kind.IQ4_NL: "4-bit iq4_nl, groups of 32, fp16 scale",
    Kind.IQ4_XS: "4-bit iq4_nl, groups of 32, 6-bit scale × fp16",
    Kind.MXFP4: "4-bit e2m1, groups of 32, e8m0 scale",
    Kind.NVFP4: "4-bit e2m1, groups of 16, e4m3 scale × fp32",
    Kind.TQ1_0: "2-bit, groups of 256, fp16 scale",
    Kind.TQ2_0: "2-bit, groups of 256, fp16 scale",
}
TERNARY = (Kind.TQ1_0, Kind.TQ2_0)  # 2 bits hold three values
N, K = 3, 512


def dequantized(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    """The gguf package's float32 [out, in]."""
    return quants.dequantize(blocks.reshape(len(blocks), -1), kind).astype(np.float32)


def test_every_type_with_a_reader_is_here_or_counted_by_hand():
    assert {k.name for k in SAID} | {"Q1_0", "Q2_0"} == set(UNPACK)
    assert set(SAID) == set(HALVES)


@pytest.mark.parametrize("kind", SAID, ids=lambda k: k.name)
def test_random_blocks_are_what_the_gguf_package_dequantizes(kind):
    blocks = random_blocks(kind, N, K, np.random.default_rng(kind.value))
    w = UNPACK[kind.name](blocks)
    assert str(w.form) == SAID[kind]
    assert w.form == FORMS[kind.name]  # what is said of such a tensor without reading it
    assert w.shape == (N, K)
    np.testing.assert_array_equal(w.dequantize(), dequantized(blocks, kind))
    size, n_bytes = GGML_QUANT_SIZES[kind]
    of_the_whole = 4 if kind == Kind.NVFP4 else 0  # the fp32, which a GGUF keeps in another tensor
    if kind not in TERNARY:
        assert w.form.n_bytes(*w.shape) == N * K // size * n_bytes + of_the_whole


@pytest.mark.parametrize("kind", SAID, ids=lambda k: k.name)
def test_blocks_of_extreme_values_too(kind):
    """All bits set and none, beside the largest, the smallest and no scale, of both signs."""
    halves = [65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0]
    rows = []
    for fill in (0x00, 0xFF, 0xF0, 0x0F, 0x80, 0x7F, 0x55, 0xAA):
        blocks = np.full_like(random_blocks(kind, len(halves), K, np.random.default_rng(0)), fill)
        for at in HALVES[kind]:
            blocks[..., at : at + 2] = np.array(halves, np.float16)[:, None, None].view(np.uint8)
        if kind == Kind.MXFP4:
            blocks[..., 0] = np.array([0, 1, 2, 126, 127, 128, 251, 252])[:, None]
        if kind == Kind.NVFP4:
            blocks[..., :4] = np.array([0, 1, 7, 8, 0x38, 0x77, 0x7D, 0x7E])[:, None, None]
        rows.append(blocks)
    blocks = np.concatenate(rows)
    w = UNPACK[kind.name](blocks)
    np.testing.assert_array_equal(w.dequantize(), dequantized(blocks, kind))
    assert np.isfinite(w.dequantize()).all()
    assert is_finite(w.scales)


def test_one_and_two_bits_by_hand():
    """The gguf package has no dequantizer for these: bit i of the bytes is for weight i, of d or -d; two bits
    are for -d, 0, d and 2 d.
    """
    half = list(np.array([0.5, -2.0], np.float16).view(np.uint8))
    first, second = half[:2] + [0b00000101] + [0] * 15, half[2:] + [0] * 15 + [0b10000000]
    w = UNPACK["Q1_0"](np.array([[first, second]], np.uint8)).dequantize()
    assert w[0, :4].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert w[0, 4:128].tolist() == [-0.5] * 124
    assert w[0, 128:].tolist() == [2.0] * 127 + [-2.0]
    first, second = half[:2] + [0b11100100] + [0] * 15, half[2:] + [0b01010101] * 15 + [0b11010101]
    w = UNPACK["Q2_0"](np.array([[first, second]], np.uint8)).dequantize()
    assert w[0, :64].tolist() == [-0.5, 0, 0.5, 1.0] + [-0.5] * 60
    assert w[0, 64:].tolist() == [0.0] * 63 + [-4.0]


def test_sizes_of_types_are_those_of_the_gguf_package():
    known = {kind.name: (kind.value, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    for number, (name, size, n_bytes) in TYPES.items():
        if name in known:
            assert known[name] == (number, size, n_bytes)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q6_K, Kind.IQ4_XS], ids=lambda k: k.name)
def test_a_weight_of_several_pieces_is_whole(kind):
    n = 5 * PIECE // 2048 // 2
    blocks = random_blocks(kind, n, 2048, np.random.default_rng(0))
    w = UNPACK[kind.name](blocks)
    for rows in (slice(0, 9), slice(PIECE // 2048 - 9, PIECE // 2048 + 9), slice(-9, None)):
        np.testing.assert_array_equal(w.dequantize()[rows], dequantized(blocks[rows], kind))


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [
        (Kind.Q2_K, 80, b"\x00\x7c"),
        (Kind.Q2_K, 82, b"\x01\x7e"),
        (Kind.Q3_K, 108, b"\x00\xfc"),
        (Kind.Q5_K, 2, b"\x00\xfe"),
        (Kind.Q6_K, 208, b"\xff\x7f"),
        (Kind.IQ4_XS, 0, b"\x00\x7c"),
        (Kind.TQ1_0, 52, b"\x00\x7c"),
        (Kind.MXFP4, 0, b"\xff"),
        (Kind.MXFP4, 0, b"\xfd"),  # a finite scale that makes weights infinite
        (Kind.NVFP4, 2, b"\x7f"),
        (Kind.NVFP4, 2, b"\xff"),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_scales_that_are_no_numbers_are_seen_without_opening_them(kind, at, value):
    blocks = random_blocks(kind, N, K, np.random.default_rng(1))
    sound = UNPACK[kind.name](blocks)
    blocks[1, 1, at : at + len(value)] = list(value)
    w = UNPACK[kind.name](blocks)
    with np.errstate(all="ignore"):
        assert not np.isfinite(w.dequantize()).all()
    for finite, linear in ((True, sound), (False, w)):
        beside = [a for a in (linear.scales, linear.offsets) if a is not None]
        assert all(map(is_finite, beside)) == finite
