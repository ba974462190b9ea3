"""What backends store of a weight: the smallest form with kernels that holds it to the last bit."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from programs import CODED, FORMS, random_coded, random_dense, random_linear

from tinychat.backends import cpu_pack, cuda_pack
from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.base.errors import CheckpointError
from tinychat.network.weight_form import Coded, floats
from tinychat.network.weights import DenseLinear, Linear, QuantizedLinear, quantize_int8

N, K, GROUP = 5, 128, 32
STORED = {
    "symmetric": "4-bit, groups of 32, fp16 scale",
    "zeros": "4-bit, groups of 32, fp16 scale and zero point",
    "zeros16": "4-bit, groups of 32, fp32 scale and offset",
    "offsets": "4-bit, groups of 32, fp16 scale and offset",
    "float": "4-bit, groups of 32, fp32 scale and offset",
    "int8": "8-bit, groups of 32, fp16 scale",
    "int8-float": "8-bit, groups of 32, fp32 scale",
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
}


DENSE = ("fp32", "fp16", "bf16")
ALL = cpu_pack.KERNELS
SOME = Kernels(
    frozenset({("4", "fp16", "none"), ("4", "fp32", "fp32"), ("8", "fp16", "none"), ("8", "fp32", "fp32")})
)


def made(kind: str, group: int = GROUP) -> Linear:
    rng = np.random.default_rng(list(STORED).index(kind))
    return (
        random_dense(rng, kind, N, K, True) if kind in DENSE else random_linear(rng, kind, N, K, group, True)
    )


def values(w: ExactForm) -> np.ndarray:
    """float64 [out, in]: what the arrays mean, by the words of the form."""
    if w.form.decoding == "bf16":
        return np.array([[int(b) << 16 for b in row] for row in w.codes], np.uint32).view(np.float32)
    q = w.codes.astype(np.float64)
    if w.scales is None:
        return q
    each = [
        None if a is None else np.repeat(a.astype(np.float64), w.group, axis=1) for a in (w.scales, w.beside)
    ]
    if w.form.offset == "zero":
        return (q - each[1]) * each[0]
    if each[1] is not None:
        return q * each[0] + each[1]
    return (q if w.codes.dtype == np.int8 else q - 8) * each[0]


@pytest.mark.parametrize("kind", STORED)
def test_the_form_is_the_smallest_that_is_exact(kind):
    w = made(kind)
    exact = ExactForm.of(w, ALL)
    assert str(exact.form) == STORED[kind]
    assert exact.shape == (N, K)
    np.testing.assert_array_equal(exact.bias, w.bias)
    difference = np.abs(values(exact) - w.dequantize())
    assert difference.max() <= np.abs(w.dequantize()).max() * 2.0**-22  # one fp32 product and one sum apart


def test_every_form_of_the_kernels_tests_is_here():
    assert set(STORED) == {*FORMS, *DENSE}


def test_scales_in_fp32_that_halves_hold_are_stored_in_halves():
    w = made("offsets")
    wide = QuantizedLinear(w.codes, w.scales.astype(np.float32), offsets=w.offsets.astype(np.float32))
    assert str(ExactForm.of(wide, ALL).form) == STORED["offsets"]


def test_a_permutation_stays_beside_codes_and_is_undone_in_floats():
    rng = np.random.default_rng(1)
    perm = rng.permutation(K).astype(np.int64)
    whole = QuantizedLinear(made("zeros").codes, made("zeros").scales, made("zeros").zeros, perm=perm)
    assert ExactForm.of(whole, ALL).perm.dtype == np.int32
    small = made("zeros", group=8)
    odd = QuantizedLinear(small.codes, small.scales, small.zeros, perm=perm)
    exact = ExactForm.of(odd, ALL)
    assert str(exact.form) == "fp32"  # no kernel has groups of 8
    assert exact.perm is None
    np.testing.assert_array_equal(exact.codes, odd.dequantize())


def stored(kind: str) -> QuantizedLinear:
    return random_coded(np.random.default_rng(7), kind, N, 768)


NEW = [k for k in CODED if "fp32" not in k and k != "mixed"]


@pytest.mark.parametrize("kind", NEW)
def test_what_kernels_read_is_stored_as_it_is_in_the_file(kind):
    w = stored(kind)
    exact = ExactForm.of(w, ALL)
    assert ALL.hold(w.form, w.shape[1])
    assert not exact.rounded
    assert exact.form == w.form
    assert exact.form.n_bytes(*exact.shape) == w.form.n_bytes(*w.shape)
    assert exact.codes is w.codes
    for mine, own in ((exact.scales, w.scales), (exact.beside, w.offsets if w.zeros is None else w.zeros)):
        if isinstance(own, Coded):
            assert (mine.kind, mine.codes.dtype, mine.times is own.times) == (own.kind, own.codes.dtype, True)
            np.testing.assert_array_equal(mine.codes, own.codes)
        else:
            np.testing.assert_array_equal(mine, own)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q5_1", "q6_k", "iq4_xs", "mxfp4", "nvfp4", "4-bit halves"])
def test_what_kernels_do_not_read_is_rounded_to_int8_and_says_so(kind):
    w = stored(kind)
    exact, rounded = ExactForm.of(w, SOME), quantize_int8(w.dequantize())
    assert exact.rounded
    assert not SOME.hold(w.form, w.shape[1])
    assert str(exact.form) == STORED["int8"]
    np.testing.assert_array_equal(exact.codes, rounded.codes)
    np.testing.assert_array_equal(exact.scales, rounded.scales)


def test_coded_scales_become_floats_where_kernels_read_their_codes_alone():
    w = stored("q4_k")
    exact = ExactForm.of(w, SOME)
    assert SOME.hold(w.form, w.shape[1])
    assert not exact.rounded
    assert str(exact.form) == STORED["float"]
    np.testing.assert_array_equal(exact.scales, floats(w.scales))
    np.testing.assert_array_equal(exact.beside, floats(w.offsets))


def test_a_super_scale_of_other_than_256_inputs_becomes_floats():
    w = stored("q4_k")
    scales = Coded("int6", w.scales.codes, w.scales.times[:, :1])
    exact = ExactForm.of(QuantizedLinear(w.codes, scales), ALL)
    assert (exact.form.scale, exact.form.offset) == ("fp32", "none")
    np.testing.assert_array_equal(exact.scales, floats(scales))


def test_integers_of_eight_bits_without_a_sign_are_stored_as_they_are_while_int8_holds_them():
    w = stored("q6_k")
    for top, kind in ((127, "int8"), (129, "fp32")):
        codes = np.full(w.scales.shape, top, np.uint8)
        exact = ExactForm.of(
            QuantizedLinear(w.codes, Coded("int8", codes, w.scales.times), bits=6),
            ALL,
        )
        assert exact.form.scale == kind
        scales = floats(exact.scales)
        np.testing.assert_array_equal(scales, np.repeat(floats(w.scales.times), 16, axis=1) * top)


@pytest.mark.parametrize("beside", ["none", "zeros", "offsets"])
def test_unsigned_bytes_become_signed_ones(beside):
    rng = np.random.default_rng(3)
    codes, zeros = (rng.integers(0, 256, s, dtype=np.uint8) for s in ((N, 64), (N, 2)))
    scales = rng.uniform(0.01, 0.02, (N, 2)).astype(np.float16)
    w = QuantizedLinear(
        codes,
        scales,
        zeros if beside == "zeros" else None,
        -scales if beside == "offsets" else None,
        bits=8,
    )
    exact = ExactForm.of(w, ALL)
    assert exact.codes.dtype == np.int8
    pair = "fp16 scale" if beside == "none" else "fp32 scale and offset"
    assert str(exact.form) == f"8-bit, groups of 32, {pair}"
    np.testing.assert_allclose(values(exact), w.dequantize(), rtol=1e-6, atol=1e-6)


def test_scales_of_blocks_become_those_of_rows():
    rng = np.random.default_rng(4)
    scales = rng.uniform(0.01, 0.02, (2, 2)).astype(np.float32)
    w = QuantizedLinear(rng.integers(-127, 128, (N, 64), dtype=np.int8), scales, bits=8, rows=3)
    exact = ExactForm.of(w, ALL)
    assert str(exact.form) == "8-bit, groups of 32, fp32 scale"
    np.testing.assert_array_equal(exact.scales, scales[[0, 0, 0, 1, 1]])


def test_a_scale_without_a_number_is_refused_where_it_must_be_rounded():
    codes = Coded("e8m0", np.full((N, 2), 255, np.uint8))
    w = QuantizedLinear(np.ones((N, 64), np.uint8), codes, table="e2m1")
    with pytest.raises(CheckpointError, match=r"layers\.3.*NaN"):
        ExactForm.of(w, SOME, "model.layers.3.mlp.up_proj")


@pytest.mark.parametrize("kind", STORED)
def test_both_layouts_take_every_form(kind):
    w = made(kind)
    assert cpu_pack.pack(w).shape == (N, K)
    shape, parts = cuda_pack.pack(w)
    assert (shape.n, shape.k) == (N, K)
    assert (parts["codes"].nbytes, 0 if parts["meta"] is None else parts["meta"].nbytes) == shape.sizes[:2]


# What the first build with packs of version 4 wrote, by layout: a change that moves a byte changes its name.
WRITTEN = {
    "symmetric": ("cf4449cdbd4e", "342523b884b7"),
    "zeros": ("4994b106c5ca", "8b971b0da62a"),
    "zeros16": ("f574c964ef4e", "8af787b3845c"),
    "offsets": ("887190a8deb8", "861f36411e7c"),
    "float": ("bfe8824c7ea0", "4b0e5f6b2c8f"),
    "int8": ("4fceb844d94f", "81c619557544"),
    "int8-float": ("e11b8c51e46d", "91e7bd855be4"),
    "fp32": ("5236ff25dfc0", "2e7434f551c0"),
    "fp16": ("1a8949d0808f", "b126cd884b8b"),
    "bf16": ("113533730514", "efa837e9a41c"),
}


def by_hand(kind: str) -> Linear:
    """A weight without random numbers."""

    def counted(k: int, modulo: int) -> np.ndarray:
        return (np.arange(21 * k) * 7 % modulo).reshape(21, k)

    codes, zeros = counted(128, 16).astype(np.uint8), counted(4, 16).astype(np.uint8)
    scales, offsets = (
        ((1 + counted(4, 11)) / 64).astype(np.float16),
        (-counted(4, 13) / 32).astype(np.float16),
    )
    wide, int8 = scales.astype(np.float32) * np.float32(1.0001), (counted(128, 255) - 127).astype(np.int8)
    floats = (counted(128, 251) / np.float32(7)).astype(np.float32)
    bias, perm = np.arange(21, dtype=np.float32), np.roll(np.arange(128), 5).astype(np.int32)
    return {
        "symmetric": lambda: QuantizedLinear(codes, scales, zeros=np.full_like(zeros, 8), bias=bias),
        "zeros": lambda: QuantizedLinear(codes, scales, zeros=zeros, perm=perm),
        "zeros16": lambda: QuantizedLinear(codes, scales, zeros=zeros + np.uint8(1)),
        "offsets": lambda: QuantizedLinear(codes, scales, offsets=offsets),
        "float": lambda: QuantizedLinear(codes, wide, offsets=offsets),
        "int8": lambda: QuantizedLinear(int8, scales, bias=bias, bits=8),
        "int8-float": lambda: QuantizedLinear(int8, wide, bits=8),
        "fp32": lambda: DenseLinear(floats, bias),
        "fp16": lambda: DenseLinear(floats.astype(np.float16)),
        "bf16": lambda: DenseLinear((floats.view(np.uint32) >> 16).astype(np.uint16), bf16=True),
    }[kind]()


@pytest.mark.parametrize("kind", WRITTEN)
def test_packs_hold_the_bytes_that_packs_of_that_name_always_held(kind):
    """Else packs of an earlier build would be read as something else."""
    for layout, written in zip((cpu_pack.CpuLayout(), cuda_pack.CudaLayout()), WRITTEN[kind], strict=True):
        digest, sizes = hashlib.sha256(), []

        def put(a, digest=digest, sizes=sizes):
            if a is None:
                return None
            digest.update(np.ascontiguousarray(a).tobytes())
            sizes.append(a.nbytes)
            return [len(sizes) - 1, a.nbytes]

        entry = layout.entry(ExactForm.of(by_hand(kind), layout.kernels), put)
        digest.update(json.dumps(entry, sort_keys=True).encode())
        assert digest.hexdigest()[:12] == written
