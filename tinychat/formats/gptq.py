"""GPTQ's layout, versions 1 and 2, and compressed-tensors' `pack-quantized`: inputs may be in any order.

For a linear of K inputs, N outputs and G groups, with codes of B bits (`nibbles` packs them):

    GPTQ                qweight int32 [K·B/32, N], packed along K; scales float16 [G, N]; g_idx int32 [K]
                        qzeros int32 [G, N·B/32], packed along N: zero - 1 in version 1, zero in version 2
    compressed-tensors  weight_packed int32 [N, K·B/32]; weight_scale [N, G]; weight_g_idx int32 [K], optional
                        weight_zero_point int32 [N·B/32, G], packed along N; without it every zero is 2^(B-1)

`g_idx[k]` is the group of input k: `k // g` unless the quantizer ordered inputs by activation.
Sources: gptqmodel 7.7, `nn_modules/qlinear`; auto-round 0.16, `utils/bit_packing` (5 and 6 bits);
compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import nibbles
from tinychat.formats.scheme import Module, Stored
from tinychat.network.weight_form import Coded, Form
from tinychat.network.weights import QuantizedLinear


def look(m: Module) -> Stored:
    """A module of GPTQ, or of AutoRound in GPTQ's packing."""
    n, k = m.n, m.k

    def shapes(bits: int, groups: int) -> dict[str, tuple[int, ...]]:
        return {"qweight": (nibbles.width(k, bits), n), "scales": (groups, n)}

    grid, groups = m.pick(shapes)
    bits = grid.bits
    weight = m.part("qweight", (m.whole(k, bits, "inputs"), n), "I32")
    zeros = m.part("qzeros", (groups, m.whole(n, bits, "outputs")), "I32")
    scales = m.numbers("scales", (groups, n))
    g_idx = m.part("g_idx", (k,), "I32") if m.has("g_idx") else None

    def read() -> QuantizedLinear:
        idx = None if g_idx is None else g_idx.read()
        return unpack(weight.read(), zeros.read(), scales.numbers(), idx, m.said.version, bits=bits)

    return Stored(Form(bits, "unsigned", m.group(groups), scales.kind, "zero"), read)


def pack(weight: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors of version 1 (and `bias`), bit for bit.

    Raises ValueError for what they cannot hold: offsets, zero points outside 1…2^bits - 1 (0 is read as
    2^bits by some), float32 scales, outputs or inputs that are not whole words.
    """
    (n, k), bits, scales = weight.shape, weight.bits, weight.scales
    if weight.zeros is None or n * bits % 32 or k * bits % 32:
        raise ValueError("GPTQ's layout holds integer zero points and whole words")
    if isinstance(scales, Coded) or scales.dtype != np.float16:
        raise ValueError("GPTQ's layout holds float16 scales")
    if weight.zeros.min() < 1 or weight.zeros.max() >= 1 << bits:
        raise ValueError(f"GPTQ's layout holds zero points 1…{(1 << bits) - 1}")
    codes, g_idx = _in_place(weight)
    out = {
        "qweight": np.ascontiguousarray(nibbles.pack(codes, bits).T),
        "qzeros": nibbles.pack(np.ascontiguousarray(weight.zeros.T) - 1, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": g_idx,
    }
    if weight.bias is not None:
        out["bias"] = weight.bias.astype(np.float16)
    return out


def pack_compressed(weight: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors of compressed-tensors' `pack-quantized` (and `bias`), bit for bit; no zero points where all
    are in the middle. Raises ValueError for what they cannot hold: offsets, coded scales.
    """
    bits, scales = weight.bits, weight.scales
    if weight.zeros is None or isinstance(scales, Coded):
        raise ValueError("compressed-tensors hold integer zero points and scales that are floats")
    codes, g_idx = _in_place(weight)
    out = {
        "weight_packed": nibbles.pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if (weight.zeros != 1 << (bits - 1)).any():
        out["weight_zero_point"] = np.ascontiguousarray(nibbles.pack(weight.zeros.T.copy(), bits).T)
    if weight.perm is not None:
        out["weight_g_idx"] = g_idx
    if weight.bias is not None:
        out["bias"] = weight.bias.astype(np.float16)
    return out


def _in_place(weight: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] in the order of the inputs, and the group of each: int32 [K]."""
    k = weight.shape[1]
    order = np.arange(k) if weight.perm is None else weight.perm
    codes, g_idx = np.empty_like(weight.codes), np.empty(k, np.int32)
    codes[:, order] = weight.codes
    g_idx[order] = np.arange(k) // weight.group
    return codes, g_idx


def unpack(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
    version: int,
    bias: np.ndarray | None = None,
    bits: int = 4,
) -> QuantizedLinear:
    """The weight that GPTQ's tensors hold, bit for bit; their shapes have been checked.

    Version 1 keeps zero - 1 in a code's bits, so a stored 15 (of 4 bits) is the zero point 0, as gptqmodel
    reads it.
    Raises ValueError for a g_idx whose groups are not of one size.
    """
    zeros = nibbles.unpack(qzeros, bits)
    if version == 1:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    codes, perm = order(nibbles.unpack(qweight.T, bits), g_idx, scales.shape[0])
    return QuantizedLinear(
        codes,
        np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(zeros.T),
        bias=bias,
        perm=perm,
        bits=bits,
    )


def unpack_compressed(
    packed: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    g_idx: np.ndarray | None,
    bias: np.ndarray | None = None,
    bits: int = 4,
    k: int | None = None,
) -> QuantizedLinear:
    """The weight that compressed-tensors hold, bit for bit; their shapes have been checked.

    k: inputs, where the last word is not full. Without zeros the weight is symmetric: of 8 bits in int8.
    Raises ValueError for a g_idx whose groups are not of one size.
    """
    n, groups = scales.shape
    z = None if zeros is None else np.ascontiguousarray(nibbles.unpack(zeros.T, bits)[:, :n].T)
    codes, perm = order(nibbles.unpack(packed, bits)[:, :k], g_idx, groups)
    if z is None and bits == 8:
        codes = (codes ^ np.uint8(0x80)).view(np.int8)
    return QuantizedLinear(
        np.ascontiguousarray(codes), np.ascontiguousarray(scales), zeros=z, bias=bias, perm=perm, bits=bits
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
