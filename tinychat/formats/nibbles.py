"""Codes of a few bits in integer words, lowest bits first and none left out: how every format but AutoAWQ's
`gemm` packs them. A code of 3 bits may begin in one word and end in the next.
"""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 or int16 [rows, W] to uint8 [rows, codes], as many whole ones as the words hold."""
    words = np.ascontiguousarray(words)
    packed = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    if bits == 8:
        return packed
    if bits not in (2, 4):
        return _unpack_bits(packed, bits)
    out = np.empty((words.shape[0], 8 // bits * packed.shape[1]), np.uint8)
    for i in range(8 // bits):
        np.bitwise_and(packed >> (i * bits), (1 << bits) - 1, out=out[:, i :: 8 // bits])
    return out


def pack(values: np.ndarray, bits: int = 4) -> np.ndarray:
    """uint8 [rows, n], values below 2^bits, to int32 [rows, words]; the last word is filled up with zeros."""
    rows, n = values.shape
    width = -(-n * bits // 32)
    if bits in (2, 4, 8):
        each = 8 // bits
        padded = values if n * bits == 32 * width else np.pad(values, ((0, 0), (0, 4 * width * each - n)))
        packed = np.zeros((rows, 4 * width), np.uint8)
        for i in range(each):
            packed |= padded[:, i::each] << (i * bits)
    else:
        packed = np.zeros((rows, 4 * width), np.uint8)
        planes = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
        dense = np.packbits(planes.reshape(rows, -1), axis=-1, bitorder="little")
        packed[:, : dense.shape[1]] = dense
    return np.ascontiguousarray(packed).view("<i4").astype(np.int32, copy=False).reshape(rows, width)


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes] to uint8 [rows, codes], for any width."""
    n = 8 * packed.shape[1] // bits
    planes = np.unpackbits(packed, axis=1, count=n * bits, bitorder="little")
    return np.packbits(planes.reshape(-1, n, bits), axis=-1, bitorder="little")[..., 0]
