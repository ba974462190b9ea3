"""Blocks of GGUF's quantized types, bit for bit as codes and what stands beside them.

A function for each type takes uint8 [out, blocks in a row, bytes of a block] and gives the linear without its
bias. A type that has none (the i-quants of one to three bits) is dequantized by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinychat.network.weight_form import Coded
from tinychat.network.weights import QuantizedLinear

PIECE = 1 << 19  # codes that are put together at a time: they and what they are made of stay in the L2 cache

# A field of codes: uint8 [out, blocks, bytes], bits of each code in it, bytes in a run
Field = tuple[np.ndarray, int, int]


def q4_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 codes q; w = d·(q - 8)."""
    d, q = _cut(blocks, 2, 16)
    return QuantizedLinear(_codes((q, 4, 16)), _fp16(d))


def q4_1(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d and m, 32 codes q; w = d·q + m."""
    d, m, q = _cut(blocks, 2, 2, 16)
    return QuantizedLinear(_codes((q, 4, 16)), _fp16(d), offsets=_fp16(m))


def q5_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 codes q, their highest bits first; w = d·(q - 16)."""
    d, high, low = _cut(blocks, 2, 4, 16)
    return QuantizedLinear(_codes((low, 4, 16), (high, 1, 1)), _fp16(d), bits=5)


def q5_1(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d and m, 32 codes q, their highest bits first; w = d·q + m."""
    d, m, high, low = _cut(blocks, 2, 2, 4, 16)
    return QuantizedLinear(_codes((low, 4, 16), (high, 1, 1)), _fp16(d), offsets=_fp16(m), bits=5)


def q8_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 signed bytes q; w = d·q."""
    d, q = _cut(blocks, 2, 32)
    return QuantizedLinear(_flat(q).view(np.int8), _fp16(d), bits=8)


def q2_k(blocks: np.ndarray) -> QuantizedLinear:
    """16 bytes of 4-bit s (low) and m (high), 256 codes q, fp16 d and dmin; w = d·s·q - dmin·m."""
    sm, q, d, dmin = _cut(blocks, 16, 64, 2, 2)
    s, m = Coded("int4", _flat(sm & 15), _fp16(d)), Coded("int4", _flat(sm >> 4), -_fp16(dmin))
    return QuantizedLinear(_codes((q, 2, 32)), s, offsets=m, bits=2)


def q3_k(blocks: np.ndarray) -> QuantizedLinear:
    """256 codes q, their highest bits first, sixteen 6-bit s in 12 bytes, fp16 d; w = d·(s - 32)·(q - 4)."""
    high, low, packed, d = _cut(blocks, 32, 64, 12, 2)
    s = _codes((packed[..., :8], 4, 8), (packed[..., 8:], 2, 4)).view(np.int8) - np.int8(32)
    return QuantizedLinear(_codes((low, 2, 32), (high, 1, 32)), Coded("int6", s, _fp16(d)), bits=3)


def q4_k(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d and dmin, eight 6-bit s and m in 12 bytes, 256 codes q; w = d·s·q - dmin·m."""
    d, dmin, packed, q = _cut(blocks, 2, 2, 12, 128)
    s, m = _scales_and_offsets(packed, d, dmin)
    return QuantizedLinear(_codes((q, 4, 32)), s, offsets=m)


def q5_k(blocks: np.ndarray) -> QuantizedLinear:
    """As q4_k, with the highest bits of the codes before the others."""
    d, dmin, packed, high, low = _cut(blocks, 2, 2, 12, 32, 128)
    s, m = _scales_and_offsets(packed, d, dmin)
    return QuantizedLinear(_codes((low, 4, 32), (high, 1, 32)), s, offsets=m, bits=5)


def q6_k(blocks: np.ndarray) -> QuantizedLinear:
    """256 codes q, low 4 bits, then high 2, sixteen signed bytes s, fp16 d; w = d·s·(q - 32)."""
    low, high, s, d = _cut(blocks, 128, 64, 16, 2)
    scales = Coded("int8", _flat(s).view(np.int8), _fp16(d))
    return QuantizedLinear(_codes((low, 4, 64), (high, 2, 32)), scales, bits=6)


def iq4_nl(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 32 codes q; w = d·value(q)."""
    d, q = _cut(blocks, 2, 16)
    return QuantizedLinear(_codes((q, 4, 16)), _fp16(d), table="iq4_nl")


def iq4_xs(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, eight 6-bit s, high 2 bits first, 256 codes q; w = d·(s - 32)·value(q)."""
    d, high, low, q = _cut(blocks, 2, 2, 4, 128)
    s = _codes((low, 4, 1), (high, 2, 1)).view(np.int8) - np.int8(32)
    return QuantizedLinear(_codes((q, 4, 16)), Coded("int6", s, _fp16(d)), table="iq4_nl")


def mxfp4(blocks: np.ndarray) -> QuantizedLinear:
    """A byte e, 32 codes q; w = 2^(e - 127)·value(q)."""
    e, q = _cut(blocks, 1, 16)
    return QuantizedLinear(_codes((q, 4, 16)), Coded("e8m0", _flat(e)), table="e2m1")


def nvfp4(blocks: np.ndarray) -> QuantizedLinear:
    """Four e4m3 s without signs, 64 codes q; w = s·value(q)."""
    s, q = _cut(blocks, 4, 32)
    scales = Coded("e4m3", _flat(s & 0x7F), np.ones((1, 1), np.float32))
    return QuantizedLinear(_codes((q, 4, 8)), scales, table="e2m1")


def tq1_0(blocks: np.ndarray) -> QuantizedLinear:
    """256 ternary digits t, five in a byte, the last 16 four in a byte, fp16 d; w = d·(t - 1)."""
    packed, last, d = _cut(blocks, 48, 4, 2)
    runs = ((packed[..., :32], 5), (packed[..., 32:], 5), (last, 4))
    digits = [_digits(run, n) for run, n in runs]
    return QuantizedLinear(_flat(np.concatenate(digits, axis=-1)), _fp16(d), bits=2)


def tq2_0(blocks: np.ndarray) -> QuantizedLinear:
    """256 codes q of 2 bits, fp16 d; w = d·(q - 1)."""
    q, d = _cut(blocks, 64, 2)
    return _one_less(_codes((q, 2, 32)), _fp16(d))


def q1_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 128 bits q; w = d·(2q - 1)."""
    d, q = _cut(blocks, 2, 16)
    return QuantizedLinear(_codes((q, 1, 1)) * np.uint8(2) + np.uint8(1), _fp16(d), bits=2)


def q2_0(blocks: np.ndarray) -> QuantizedLinear:
    """fp16 d, 64 codes q of 2 bits; w = d·(q - 1)."""
    d, q = _cut(blocks, 2, 16)
    return _one_less(_codes((q, 2, 1)), _fp16(d))


UNPACK: dict[str, Callable[[np.ndarray], QuantizedLinear]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
    "TQ1_0": tq1_0,
    "TQ2_0": tq2_0,
    "Q1_0": q1_0,
    "Q2_0": q2_0,
}


def _cut(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Parts of each block, by their bytes."""
    ends = np.cumsum(sizes)
    assert ends[-1] == blocks.shape[-1]
    return np.split(blocks, ends[:-1], axis=-1)


def _flat(parts: np.ndarray) -> np.ndarray:
    """[out, blocks, n] to [out, blocks · n], contiguous."""
    return np.ascontiguousarray(parts).reshape(len(parts), -1)


def _codes(*fields: Field) -> np.ndarray:
    """uint8 [out, in]: codes put together of fields, the lowest bits first.

    In a field the codes of a run of bytes are the lowest bits of all its bytes, then the next bits of all.
    """
    first, bits, _ = fields[0]
    n, k = len(first), first.shape[1] * first.shape[2] * 8 // bits
    out = np.empty((n, k), np.uint8)
    rows = max(1, PIECE // max(1, k))
    for start in range(0, n, rows):
        at = 0
        for field, bits, run in fields:
            piece = np.ascontiguousarray(field[start : start + rows])
            _spread(piece.reshape(len(piece), -1, run), bits, at, out[start : start + rows])
            at += bits
    return out


def _spread(packed: np.ndarray, bits: int, at: int, out: np.ndarray) -> None:
    """Put the codes of a field, of `bits` each, into `out` [rows, in], `at` bits high.

    packed: uint8 [rows, runs, bytes of a run].
    """
    rows, runs, run = packed.shape
    places = out.reshape(rows, runs, 8 // bits, run)
    mask = (1 << bits) - 1 << at
    for j in range(8 // bits):
        shift = j * bits - at
        moved = packed >> shift if shift > 0 else packed << -shift
        if at:
            moved &= mask
            places[:, :, j] |= moved
        else:
            np.bitwise_and(moved, mask, out=places[:, :, j])


def _one_less(codes: np.ndarray, d: np.ndarray) -> QuantizedLinear:
    """w = d·(q - 1) of 2-bit codes, as -d·((3 - q) - 2): signed codes reach from -2 to 1."""
    return QuantizedLinear(codes ^ np.uint8(3), -d, bits=2)


def _scales_and_offsets(packed: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> tuple[Coded, Coded]:
    """Eight 6-bit scales and offsets of 12 bytes, for d and -dmin.

    Those of groups 0…3 are the low 6 bits of the first bytes; groups 4…7 have their upper 2 bits in the top
    of those.
    """
    low, middle, high = _cut(packed, 4, 4, 4)
    s = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    m = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return Coded("int6", _flat(s), _fp16(d)), Coded("int6", _flat(m), -_fp16(dmin))


def _digits(packed: np.ndarray, n: int) -> np.ndarray:
    """uint8 [out, blocks, run] to [out, blocks, n · run] codes 1, 2, 3 of the n ternary digits of each byte.

    A byte is the fraction 0.t₀t₁… in base 3, in 256ths and rounded up.
    """
    powers = np.array([3**i for i in range(n)], np.uint8)[:, None]
    left = packed[..., None, :] * powers  # modulo 256: digits before the point fall off
    digits = (left.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    digits += 1
    return digits.reshape(*packed.shape[:2], -1)


def _fp16(two_bytes: np.ndarray) -> np.ndarray:
    """uint8 [out, blocks, 2] to float16 [out, blocks]."""
    return np.ascontiguousarray(two_bytes).view("<f2")[..., 0]
