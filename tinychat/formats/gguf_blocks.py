"""Blocks of GGUF's quantized types, bit for bit as codes and what stands beside them.

A function for each type takes uint8 [out, blocks in a row, bytes of a block] and gives the linear without its
bias. A type that has none is dequantized by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinychat.network.weight_form import Coded
from tinychat.network.weights import QuantizedLinear


def q4_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 codes q; w = d·(q - 8)."""
    return QuantizedLinear(_nibbles(blocks[..., 2:]), _fp16(blocks[..., :2]))


def q4_1(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d and m, 32 codes q; w = d·q + m."""
    offsets = _fp16(blocks[..., 2:4])
    return QuantizedLinear(_nibbles(blocks[..., 4:]), _fp16(blocks[..., :2]), offsets=offsets)


def q8_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 signed bytes q; w = d·q."""
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(blocks), -1)
    return QuantizedLinear(codes, _fp16(blocks[..., :2]), bits=8)


def q4_k(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d and dmin, eight 6-bit s and m in 12 bytes, 256 codes q; w = d·s·q - dmin·m."""
    n = len(blocks)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # groups 0…3 are the low 6 bits of the first bytes; groups 4…7 have their upper 2 bits in the top of those
    s = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1).reshape(n, -1)
    m = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1).reshape(n, -1)
    scales = Coded("int6", s, _fp16(blocks[..., 0:2]))
    offsets = Coded("int6", m, -_fp16(blocks[..., 2:4]))
    return QuantizedLinear(_nibbles(blocks[..., 16:].reshape(n, -1, 32)), scales, offsets=offsets)


UNPACK: dict[str, Callable[[np.ndarray], QuantizedLinear]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
}


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [out, runs, b] to [out, codes]: of each run all low nibbles, then all high nibbles."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1).reshape(len(packed), -1)


def _fp16(two_bytes: np.ndarray) -> np.ndarray:
    """uint8 [out, blocks, 2] to float16 [out, blocks]."""
    return np.ascontiguousarray(two_bytes).view("<f2")[..., 0]
