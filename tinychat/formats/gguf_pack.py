"""Blocks of GGUF's quantized types made of codes and what stands beside them: the inverse of `gguf_blocks`.

A function for each type takes a linear and gives uint8 [out, bytes of a row], bit for bit. Raises ValueError
for what a type cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinychat.network.weight_form import Coded, Numbers
from tinychat.network.weights import QuantizedLinear

BLOCK = 32


def q4_0(w: QuantizedLinear) -> np.ndarray:
    """fp16 d, 32 codes q; w = d·(q - 8)."""
    _middle(w, 8)
    return _blocks(_halves(w.scales), _nibbles(w.codes, BLOCK))


def q4_1(w: QuantizedLinear) -> np.ndarray:
    """fp16 d and m, 32 codes q; w = d·q + m."""
    return _blocks(_halves(w.scales), _halves(w.offsets), _nibbles(w.codes, BLOCK))


def q5_0(w: QuantizedLinear) -> np.ndarray:
    """fp16 d, the fifth bits of 32 codes q, then their low nibbles; w = d·(q - 16)."""
    _middle(w, 16)
    fifth = np.packbits((w.codes >> 4).reshape(len(w.codes), -1, BLOCK), axis=-1, bitorder="little")
    return _blocks(_halves(w.scales), fifth, _nibbles(w.codes & 15, BLOCK))


def q8_0(w: QuantizedLinear) -> np.ndarray:
    """fp16 d, 32 signed bytes q; w = d·q."""
    codes = w.codes
    if codes.dtype == np.uint8:
        _middle(w, 128)
        codes = (codes ^ 0x80).view(np.int8)
    return _blocks(_halves(w.scales), codes.view(np.uint8).reshape(len(codes), -1, BLOCK))


def q4_k(w: QuantizedLinear) -> np.ndarray:
    """fp16 d and dmin, eight 6-bit s and m in 12 bytes, 256 codes q; w = d·s·q - dmin·m."""
    if not (isinstance(w.scales, Coded) and isinstance(w.offsets, Coded)) or w.scales.kind != "int6":
        raise ValueError("Q4_K holds 6-bit scales and offsets")
    n = len(w.codes)
    s, m = w.scales.codes.reshape(n, -1, 8), w.offsets.codes.reshape(n, -1, 8)
    # the low 6 bits of the first bytes are groups 0…3; their top holds the upper 2 bits of groups 4…7
    low = s[..., :4] | (s[..., 4:] >> 4 << 6)
    middle = m[..., :4] | (m[..., 4:] >> 4 << 6)
    high = (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4
    assert w.scales.times is not None
    assert w.offsets.times is not None
    beside = [_halves(w.scales.times), _halves(-w.offsets.times), low, middle, high]
    return _blocks(*beside, _nibbles(w.codes, 64).reshape(n, -1, 128))


PACK: dict[str, Callable[[QuantizedLinear], np.ndarray]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q4_K": q4_k,
    "Q5_0": q5_0,
    "Q8_0": q8_0,
}


def _middle(w: QuantizedLinear, zero: int) -> None:
    if w.offsets is not None or (w.zeros is not None and (w.zeros != zero).any()):
        raise ValueError(f"the type holds no zero point but {zero}")


def _halves(numbers: Numbers | None) -> np.ndarray:
    """float16 [out, blocks] to uint8 [out, blocks, 2]."""
    if not isinstance(numbers, np.ndarray) or numbers.dtype != np.float16:
        raise ValueError("the type holds float16")
    return np.ascontiguousarray(numbers, "<f2")[..., None].view(np.uint8)


def _nibbles(codes: np.ndarray, run: int) -> np.ndarray:
    """uint8 [out, in] to [out, in / run, run / 2]: the first half of a run in the low nibbles."""
    halves = codes.reshape(len(codes), -1, 2, run // 2)
    return halves[:, :, 0] | halves[:, :, 1] << 4


def _blocks(*parts: np.ndarray) -> np.ndarray:
    """uint8 [out, blocks, bytes] of each part, side by side: [out, bytes of a row]."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)
