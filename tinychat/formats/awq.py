"""AutoAWQ's `gemm` layout: 4-bit codes packed along the outputs, eight to an int32 word.

For a linear of K inputs, N outputs and groups of g inputs (G = K / g):

    qweight  int32 [K, N/8]     nibble i of word c (lowest first) holds output 8c + ORDER[i]
    qzeros   int32 [G, N/8]     packed the same way; the zero points as they are
    scales   float16 [G, N]

so that `w[n, k] = (q[n, k] - zero[n, k // g]) * scale[n, k // g]`.
Source: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

import numpy as np

from tinychat.network.weight_form import exact_halves
from tinychat.network.weights import QuantizedLinear

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, N], values 0…15, to int32 [rows, N/8] words. ValueError if 8 does not divide N."""
    rows, n = values.shape
    if n % 8:
        raise ValueError(f"{n} outputs are not a multiple of 8, which AutoAWQ's packing needs")
    lanes = values.reshape(rows, n // 8, 8)
    packed = np.empty((rows, n // 8, 4), np.uint8)
    for byte in range(4):
        np.left_shift(lanes[:, :, ORDER[2 * byte + 1]], 4, out=packed[:, :, byte])
        packed[:, :, byte] |= lanes[:, :, ORDER[2 * byte]]
    return packed.reshape(rows, n // 2).view("<i4").astype(np.int32, copy=False)


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [rows, N/8] words to uint8 [rows, N], values 0…15."""
    rows, n8 = words.shape
    packed = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(rows, n8, 4)
    lanes = np.empty((rows, n8, 8), np.uint8)
    for byte in range(4):
        np.bitwise_and(packed[:, :, byte], 15, out=lanes[:, :, ORDER[2 * byte]])
        np.right_shift(packed[:, :, byte], 4, out=lanes[:, :, ORDER[2 * byte + 1]])
    return lanes.reshape(rows, n8 * 8)


def pack(weight: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors `qweight`, `qzeros`, `scales` (and `bias`) of a weight, bit for bit.

    Raises ValueError for what the layout cannot hold: offsets, a permutation, zeros above 15, float32 scales
    that float16 does not represent, outputs that are not a multiple of 8.
    """
    if weight.bits != 4 or weight.zeros is None or weight.perm is not None:
        raise ValueError("AutoAWQ's gemm layout holds 4 bits, integer zero points and no permutation")
    if weight.zeros.size and weight.zeros.max() > 15:
        raise ValueError("AutoAWQ's gemm layout holds zero points up to 15")
    scales = exact_halves(weight.scales)
    if scales is None:
        raise ValueError("the scales are not exact in float16")
    out = {
        "qweight": pack_nibbles(np.ascontiguousarray(weight.codes.T)),
        "qzeros": pack_nibbles(np.ascontiguousarray(weight.zeros.T)),
        "scales": np.ascontiguousarray(scales.T),
    }
    if weight.bias is not None:
        out["bias"] = weight.bias.astype(np.float16)
    return out


def unpack(
    qweight: np.ndarray, qzeros: np.ndarray | None, scales: np.ndarray, bias: np.ndarray | None = None
) -> QuantizedLinear:
    """The weight that the tensors hold, bit for bit. `qzeros` None: symmetric, zero 8.

    Raises ValueError when the shapes do not belong together.
    """
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = scales.shape[0]
    if scales.shape != (groups, n) or groups == 0 or k % groups:
        raise ValueError(f"scales {scales.shape} do not fit qweight {qweight.shape}")
    if qzeros is not None and qzeros.shape != (groups, n // 8):
        raise ValueError(f"qzeros {qzeros.shape} do not fit scales {scales.shape}")
    zeros = np.full((groups, n), 8, np.uint8) if qzeros is None else unpack_nibbles(qzeros)
    return QuantizedLinear(
        codes=np.ascontiguousarray(unpack_nibbles(qweight).T),
        scales=np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(zeros.T),
        bias=None if bias is None else bias.astype(np.float32),
    )
