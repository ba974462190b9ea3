"""GPTQ's layout, versions 1 and 2, and compressed-tensors' `pack-quantized`: inputs may be in any order.

For a linear of K inputs, N outputs and G groups:

    GPTQ                qweight int32 [K/8, N], packed along K; scales float16 [G, N]; g_idx int32 [K]
                        qzeros int32 [G, N/8], packed along N: zero - 1 in version 1, zero in version 2
    compressed-tensors  weight_packed int32 [N, K/8]; weight_scale [N, G]; weight_g_idx int32 [K], optional
                        weight_zero_point int32 [N/8, G], packed along N; without it every zero is 8

`g_idx[k]` is the group of input k: `k // g` unless the quantizer ordered inputs by activation.
Sources: gptqmodel 7.7, `nn_modules/qlinear`; compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import nibbles
from tinychat.network.weight_form import Coded
from tinychat.network.weights import QuantizedLinear


def pack(weight: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors of version 1 (and `bias`), bit for bit.

    Raises ValueError for what they cannot hold: offsets, zero points outside 1…15 (0 is read as 16 by some),
    float32 scales, outputs or inputs that are not a multiple of 8.
    """
    (n, k), scales = weight.shape, weight.scales
    if weight.bits != 4 or weight.zeros is None or n % 8 or k % 8:
        raise ValueError("GPTQ's layout holds 4 bits, integer zero points and whole words of 8")
    if isinstance(scales, Coded) or scales.dtype != np.float16:
        raise ValueError("GPTQ's layout holds float16 scales")
    if weight.zeros.min() < 1 or weight.zeros.max() > 15:
        raise ValueError("GPTQ's layout holds zero points 1…15")
    order = np.arange(k) if weight.perm is None else weight.perm
    codes, g_idx = np.empty_like(weight.codes), np.empty(k, np.int32)
    codes[:, order] = weight.codes
    g_idx[order] = np.arange(k) // weight.group
    out = {
        "qweight": np.ascontiguousarray(nibbles.pack(codes).T),
        "qzeros": nibbles.pack(np.ascontiguousarray(weight.zeros.T) - 1),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": g_idx,
    }
    if weight.bias is not None:
        out["bias"] = weight.bias.astype(np.float16)
    return out


def unpack(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
    version: int,
    bias: np.ndarray | None = None,
) -> QuantizedLinear:
    """The weight that GPTQ's tensors hold, bit for bit; their shapes have been checked.

    Version 1 keeps zero - 1 in its four bits, so a stored 15 is the zero point 0, as gptqmodel reads it.
    Raises ValueError for a g_idx whose groups are not of one size.
    """
    zeros = nibbles.unpack(qzeros)
    if version == 1:
        zeros = (zeros + 1) & 15
    codes, perm = order(nibbles.unpack(qweight.T), g_idx, scales.shape[0])
    return QuantizedLinear(
        codes,
        np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(zeros.T),
        bias=bias,
        perm=perm,
    )


def unpack_compressed(
    packed: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    g_idx: np.ndarray | None,
    bias: np.ndarray | None = None,
) -> QuantizedLinear:
    """The weight that compressed-tensors hold, bit for bit; their shapes have been checked.

    Raises ValueError for a g_idx whose groups are not of one size.
    """
    n, groups = scales.shape
    z = np.full((n, groups), 8, np.uint8) if zeros is None else nibbles.unpack(zeros.T)[:, :n].T
    codes, perm = order(nibbles.unpack(packed), g_idx, groups)
    return QuantizedLinear(
        codes, np.ascontiguousarray(scales), zeros=np.ascontiguousarray(z), bias=bias, perm=perm
    )


def order(codes: np.ndarray, g_idx: np.ndarray | None, groups: int) -> tuple[np.ndarray, np.ndarray | None]:
    """[N, K] codes with groups side by side, and the input that each column multiplies; None: as is."""
    k = codes.shape[1]
    if g_idx is None or np.array_equal(g_idx, np.arange(k) // (k // groups)) or (g_idx == -1).all():
        return codes, None
    if ((g_idx < 0) | (g_idx >= groups)).any() or (np.bincount(g_idx, minlength=groups) != k // groups).any():
        raise ValueError(f"g_idx does not deal {k} inputs to {groups} groups of one size")
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    return np.ascontiguousarray(codes[:, perm]), perm
