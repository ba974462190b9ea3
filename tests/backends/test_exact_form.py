"""What backends store of a weight: the smallest form with kernels that holds it to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from programs import random_dense, random_linear

from tinychat.backends import cpu_pack, cuda_pack
from tinychat.backends.exact_form import ExactForm
from tinychat.base.errors import UnsupportedModelError
from tinychat.network.weight_form import Coded
from tinychat.network.weights import Linear, QuantizedLinear

N, K, GROUP = 5, 128, 32
STORED = {
    "symmetric": "4-bit, groups of 32, fp16 scale",
    "zeros": "4-bit, groups of 32, fp16 scale and zero point",
    "zeros16": "4-bit, groups of 32, fp32 scale and offset",
    "offsets": "4-bit, groups of 32, fp16 scale and offset",
    "float": "4-bit, groups of 32, fp32 scale and offset",
    "int8": "8-bit, groups of 32, fp16 scale",
    "int8-float": "8-bit, groups of 32, fp32 scale and offset",
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
}


def made(kind: str, group: int = GROUP) -> Linear:
    rng = np.random.default_rng(list(STORED).index(kind))
    dense = kind in ("fp32", "fp16", "bf16")
    return random_dense(rng, kind, N, K, True) if dense else random_linear(rng, kind, N, K, group, True)


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
    exact = ExactForm.of(w)
    assert str(exact.form) == STORED[kind]
    assert exact.shape == (N, K)
    np.testing.assert_array_equal(exact.bias, w.bias)
    difference = np.abs(values(exact) - w.dequantize())
    assert difference.max() <= np.abs(w.dequantize()).max() * 2.0**-22  # one fp32 product and one sum apart


def test_scales_in_fp32_that_halves_hold_are_stored_in_halves():
    w = made("offsets")
    wide = QuantizedLinear(w.codes, w.scales.astype(np.float32), offsets=w.offsets.astype(np.float32))
    assert str(ExactForm.of(wide).form) == STORED["offsets"]


def test_a_permutation_stays_beside_codes_and_is_undone_in_floats():
    rng = np.random.default_rng(1)
    perm = rng.permutation(K).astype(np.int64)
    whole = QuantizedLinear(made("zeros").codes, made("zeros").scales, made("zeros").zeros, perm=perm)
    assert ExactForm.of(whole).perm.dtype == np.int32
    small = made("zeros", group=16)
    odd = QuantizedLinear(small.codes, small.scales, small.zeros, perm=perm)
    exact = ExactForm.of(odd)
    assert str(exact.form) == "fp32"  # no kernel has groups of 16
    assert exact.perm is None
    np.testing.assert_array_equal(exact.codes, odd.dequantize())


@pytest.mark.parametrize(
    ("w", "said"),
    [
        (
            QuantizedLinear(np.zeros((4, 64), np.uint8), np.ones((4, 4), np.float16), bits=6),
            "6-bit, groups of 16",
        ),
        (
            QuantizedLinear(np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float16), bits=8),
            "8-bit, groups of 32",
        ),
        (
            QuantizedLinear(
                np.zeros((4, 64), np.uint8), Coded("e8m0", np.full((4, 2), 127, np.uint8)), table="e2m1"
            ),
            "4-bit e2m1, groups of 32, e8m0 scale",
        ),
    ],
)
def test_codes_without_kernels_are_refused_in_two_lines(w, said):
    with pytest.raises(UnsupportedModelError, match=f"layers.3.*{said}") as e:
        ExactForm.of(w, "model.layers.3.mlp.up_proj")
    assert "Q4_K_M" in e.value.todo


@pytest.mark.parametrize("kind", STORED)
def test_both_layouts_take_every_form(kind):
    w = made(kind)
    assert cpu_pack.pack(w).shape == (N, K)
    shape, parts = cuda_pack.pack(w)
    assert (shape.n, shape.k) == (N, K)
    assert (parts["codes"].nbytes, 0 if parts["meta"] is None else parts["meta"].nbytes) == shape.sizes[:2]
