"""Packs 4-bit codes as each format's own library does: their packing code, without their quantizers.

codes uint8 [N, K], zeros uint8 [N, G], scales float16 [N, G]; `groups[k]` is the group of input k.
"""

from __future__ import annotations

import numpy as np


def autoawq_gemv(codes, zeros, scales):
    """AutoAWQ 0.2.9, awq/modules/linear/gemv.py, `WQLinear_GEMV.from_linear`."""
    n, k = codes.shape
    width = calculate_zeros_width(k, k // scales.shape[1])
    qscales = np.zeros((n, width * 8), np.float16)
    qscales[:, : scales.shape[1]] = scales
    intweight, zeros = codes.astype(np.int64), zeros.astype(np.int64)
    qweight, qzeros = np.zeros((n, k // 8), np.int64), np.zeros((n, width), np.int64)
    for col in range(k // 8):
        for i in range(8):
            qweight[:, col] |= intweight[:, col * 8 + i] << (i * 4)
    for col in range((zeros.shape[1] + 7) // 8):
        for i in range(8):
            if col * 8 + i >= zeros.shape[1]:
                continue
            qzeros[:, col] |= zeros[:, col * 8 + i] << (i * 4)
    return {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": qscales}


def autoawq_gemv_fast(codes, zeros, scales, zeros_name="qzeros"):
    """AutoAWQ 0.2.9, awq/modules/linear/gemv_fast.py, `from_linear` and `pack_intweight`."""
    n, k = codes.shape
    qscales = np.zeros((n, calculate_zeros_width(k, k // scales.shape[1]) * 8), np.float16)
    qscales[:, : scales.shape[1]] = scales
    qzeros = np.zeros_like(qscales)
    product = qscales[:, : scales.shape[1]].astype(np.float32) * zeros.astype(np.float32)
    qzeros[:, : scales.shape[1]] = -product.astype(np.float16)
    packed = codes.astype(np.int32).reshape(n, k // 32, 32)
    packed = packed.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    packed = packed.reshape(n, k // 32, 32)
    packed = packed.reshape(n, k // 32, 4, 8)
    packed = packed.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    packed = packed.reshape(n, k)
    packed = packed.reshape(n // 4, 4, k // 64, 64)
    packed = packed.transpose(0, 2, 1, 3)
    packed = packed.reshape(n // 4, k // 64, 64, 4)
    packed = packed[..., 0] | (packed[..., 1] << 4) | (packed[..., 2] << 8) | (packed[..., 3] << 12)
    return {
        "qweight": packed.reshape(n // 4, k).astype(np.int16),
        "scales": np.ascontiguousarray(qscales.T),
        zeros_name: np.ascontiguousarray(qzeros.T),
    }


def calculate_zeros_width(in_features, group_size, pack_num=8):
    size_multiplier = 1 if group_size >= 128 else {64: 2, 32: 4}[group_size]
    base_width = (in_features // group_size + pack_num - 1) // pack_num
    return (base_width + size_multiplier - 1) // size_multiplier * size_multiplier


def gptq(codes, zeros, scales, groups, version):
    """gptqmodel 7.7, nn_modules/qlinear/__init__.py, `pack_block`; v1: `_shift_gptq_qzeros`."""
    n, k = codes.shape
    w = codes.T.astype(np.int64).reshape(k // 8, 8, n)
    qweight = (w << (np.arange(8) * 4)[None, :, None]).sum(axis=1)
    z = zeros.T.astype(np.int64)
    if version == 1:
        z = (z - 1) & 15
    qzeros = np.zeros((z.shape[0], n // 8), np.int64)
    for col in range(n // 8):
        for j in range(8):
            qzeros[:, col] |= z[:, col * 8 + j] << (4 * j)
    return {
        "qweight": int32(qweight),
        "qzeros": int32(qzeros),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": groups.astype(np.int32),
    }


def compressed_tensors(codes, zeros, scales, groups=None):
    """compressed-tensors 0.20, `PackedQuantizationCompressor.compress`; older ones wrote weight_g_idx."""
    n, k = codes.shape
    out = {
        "weight_packed": pack_to_int32(codes.astype(np.int64)),
        "weight_scale": scales,
        "weight_shape": np.array([n, k], np.int64),
    }
    if zeros is not None:
        out["weight_zero_point"] = np.ascontiguousarray(pack_to_int32(zeros.astype(np.int64).T).T)
    if groups is not None:
        out["weight_g_idx"] = groups.astype(np.int32)
    return out


def pack_to_int32(values):
    """Along the last axis, padded to whole words; `values` have their offset of 8 already."""
    rows, cols = values.shape
    padded = np.zeros((rows, -(-cols // 8) * 8), np.int64)
    padded[:, :cols] = values
    return int32((padded.reshape(rows, -1, 8) << (np.arange(8) * 4)).sum(axis=2))


def int32(words):
    return np.ascontiguousarray(words & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
