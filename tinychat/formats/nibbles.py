"""Codes of a few bits in integer words, lowest bits first and none left out: how every format but AutoAWQ's
`gemm` packs them. A code of 3 bits may begin in one word and end in the next.
"""

from __future__ import annotations

import math

import numpy as np


def unpack(words: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 or int16 [rows, W] to uint8 [rows, codes], as many whole ones as the words hold."""
    words = np.ascontiguousarray(words)
    packed = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    if bits == 8:
        return packed
    return _unpack_bits(packed, bits)


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


def width(count: int, bits: int) -> int:
    """Words of 32 bits that so many codes take."""
    return -(-count * bits // 32)


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes] to uint8 [rows, codes].

    The shortest run of codes that ends with a byte repeats; each of its codes lies in at most two bytes.
    """
    rows, whole, common = len(packed), 8 * packed.shape[1] // bits, math.gcd(bits, 8)
    codes, size = 8 // common, bits // common
    if packed.shape[1] % size:
        packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % size)))
    runs, mask = packed.reshape(rows, -1, size), np.uint8((1 << bits) - 1)
    out = np.empty((rows, runs.shape[1], codes), np.uint8)
    for i in range(codes):
        byte, shift = divmod(i * bits, 8)
        lane = out[:, :, i]
        if shift == 0:
            np.bitwise_and(runs[:, :, byte], mask, out=lane)
            continue
        np.right_shift(runs[:, :, byte], np.uint8(shift), out=lane)
        if shift + bits > 8:
            lane |= runs[:, :, byte + 1] << np.uint8(8 - shift)
        if shift + bits != 8:
            lane &= mask
    return np.ascontiguousarray(out.reshape(rows, -1)[:, :whole])
