"""4-bit codes in integer words, lowest nibble first: how every format but AutoAWQ's `gemm` packs them."""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 or int16 [rows, W] to uint8 [rows, 8W] or [rows, 4W], values 0…15."""
    words = np.ascontiguousarray(words)
    packed = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    out = np.empty((words.shape[0], 2 * packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[:, 0::2])
    np.right_shift(packed, 4, out=out[:, 1::2])
    return out


def pack(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, 8W], values 0…15, to int32 [rows, W]."""
    rows, n = values.shape
    packed = values[:, 0::2] | (values[:, 1::2] << 4)
    return np.ascontiguousarray(packed).view("<i4").astype(np.int32, copy=False).reshape(rows, n // 8)
