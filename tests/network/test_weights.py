"""Linears in parts: what some rows are, and rounding them a part at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ggml_blocks import HALVES, random_blocks

from tinychat.formats.gguf_blocks import UNPACK
from tinychat.network import weights
from tinychat.network.weights import DenseLinear, QuantizedLinear, quantize_int8, rounded_to_int8

N, K = 37, 512


def linears() -> dict[str, weights.Linear]:
    rng = np.random.default_rng(0)
    out = {k.name: UNPACK[k.name](random_blocks(k, N, K, rng)) for k in HALVES}
    codes = rng.integers(0, 256, (N, K), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no numbers
    squares, bias = rng.uniform(0.5, 1, (5, 4)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    out["squares"] = QuantizedLinear(codes, squares, bits=8, table="e4m3", rows=8, bias=bias)
    out["one"] = QuantizedLinear(codes, squares[:1, :1], bits=8, table="e4m3", rows=N)
    perm = rng.permutation(K).astype(np.int32)
    zeros = rng.integers(0, 16, (N, 4), dtype=np.uint8)
    out["permuted"] = QuantizedLinear(codes & 15, np.ones((N, 4), np.float16), zeros, perm=perm)
    out["floats"] = DenseLinear(rng.normal(size=(N, K)).astype(np.float16), bias)
    out["bf16"] = DenseLinear(rng.integers(0x3C00, 0x3F00, (N, K), dtype=np.uint16), bf16=True)
    return out


LINEARS = linears()


@pytest.mark.parametrize("name", LINEARS)
def test_some_rows_are_those_of_the_whole(name):
    w = LINEARS[name]
    rows = getattr(w, "rows", 1)
    for start in range(0, N, 2 * rows):
        part = w.part(start, start + 2 * rows)
        np.testing.assert_array_equal(part.dequantize(), w.dequantize()[start : start + 2 * rows])


@pytest.mark.parametrize("name", LINEARS)
def test_rounding_in_parts_is_rounding_the_whole(name, monkeypatch):
    w = LINEARS[name]
    whole = quantize_int8(w.dequantize(), w.bias)
    for piece in (1, 5 * K, 20 * K, 1 << 20):
        monkeypatch.setattr(weights, "PIECE", piece)
        rounded = rounded_to_int8(w)
        np.testing.assert_array_equal(rounded.codes, whole.codes)
        np.testing.assert_array_equal(rounded.scales, whole.scales)
        assert rounded.bias is w.bias


def with_one(w: weights.Linear, part: str, at: tuple[int, int], value: float | int) -> weights.Linear:
    """The linear with one number of an array of it replaced; part: "codes", "scales.times", …"""
    name, _, inner = part.partition(".")
    whole = getattr(w, name)
    a = (getattr(whole, inner) if inner else whole).copy()
    a[at] = value
    return replace(w, **{name: replace(whole, **{inner: a}) if inner else a})


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("Q4_0", "scales", np.nan),
        ("Q4_1", "offsets", -np.inf),
        ("Q6_K", "scales.times", np.inf),
        ("Q5_K", "offsets.times", np.nan),
        ("MXFP4", "scales.codes", 255),
        ("MXFP4", "scales.codes", 253),  # six times that power is infinite
        ("NVFP4", "scales.codes", 0x7F),
        ("NVFP4", "scales.codes", 0xFF),
        ("NVFP4", "scales.times", 1e38),
        ("squares", "codes", 0x7F),
        ("squares", "codes", 0xFF),
        ("squares", "scales", 3e38),
        ("floats", "weight", np.inf),
        ("bf16", "weight", 0x7FC0),
        ("bf16", "weight", 0xFF80),
    ],
)
def test_what_makes_weights_no_numbers_is_seen(name, part, value):
    w = LINEARS[name]
    assert w.is_finite()
    assert not with_one(w, part, (0, 0), value).is_finite()
