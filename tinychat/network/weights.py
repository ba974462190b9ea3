"""The two kinds of linear that readers make and backends run: in codes, and in floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat.network.weight_form import (
    ROW,
    TABLES,
    Form,
    Numbers,
    below,
    floats,
    is_finite,
    is_no_e4m3,
    kind_of,
)

Q8_GROUP = 32
PIECE = 1 << 20  # weights that are rounded at a time


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight in codes: `w = (q - zero) · scale`, `w = value(q) · scale + offset` or `w = value(q) · scale`.

    codes   uint8 [out, in], values 0…2^bits - 1; or int8, signed numbers of 8 bits
    scales  [out, in/group] as stored: float16, float32 or coded
    zeros   uint8 [out, in/group], 0…2^bits (symmetric formats: constant 2^(bits - 1)), or None
    offsets [out, in/group] as stored, or None. Without zeros and offsets, uint8 codes that no table decodes
            are off by 2^(bits - 1): symmetric
    bias    float32 [out] or None
    perm    int32 [in] or None: column j of `codes` multiplies input `perm[j]` (GPTQ desc_act)
    bits    of a code
    table   the name of what decodes codes (`weight_form.TABLES`), or None: they are numbers
    rows    outputs that share a scale: scales have out/rows rows, rounded up

    Raises ValueError where these do not fit each other.
    """

    codes: np.ndarray
    scales: Numbers
    zeros: np.ndarray | None = None
    offsets: Numbers | None = None
    bias: np.ndarray | None = None
    perm: np.ndarray | None = None
    bits: int = 4
    table: str | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        rows, groups = self.scales.shape
        if rows != -(-n // self.rows) or groups == 0 or k % groups:
            raise ValueError(f"scales {self.scales.shape} do not divide codes {self.codes.shape} into groups")
        if self.zeros is not None and self.offsets is not None:
            raise ValueError("a QuantizedLinear has either zeros or offsets")
        for a in (self.zeros, self.offsets):
            if a is not None and a.shape != self.scales.shape:
                raise ValueError(f"zeros or offsets {a.shape} do not match scales {self.scales.shape}")
        if self.codes.dtype != np.uint8 and (self.bits != 8 or self.zeros is not None or self.table):
            raise ValueError(f"{self.bits}-bit codes are {self.codes.dtype}, not uint8")
        _ = self.form  # refuses what the algebra does not know

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share one scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def form(self) -> Form:
        """Form of the arrays."""
        group = ROW if self.scales.shape[1] == 1 else self.group
        offset = "zero" if self.zeros is not None else kind_of(self.offsets)
        plain = "signed" if offset == "none" or self.codes.dtype == np.int8 else "unsigned"
        rows = ROW if self.rows == self.shape[0] > 1 else self.rows
        return Form(self.bits, self.table or plain, group, kind_of(self.scales), offset, rows)

    def values(self) -> np.ndarray:
        """float32 [out, in]: the codes decoded, before zeros, scales and offsets."""
        if self.table is not None:
            return TABLES[self.table][self.codes]
        symmetric = self.codes.dtype == np.uint8 and self.zeros is None and self.offsets is None
        q = self.codes.astype(np.float32)
        return q - np.float32(1 << (self.bits - 1)) if symmetric else q

    def dequantize(self) -> np.ndarray:
        """float32 [out, in], in the order of the layer's inputs (`perm` undone)."""
        n, k = self.codes.shape
        q = self.values().reshape(n, -1, self.group)
        s = self._each_row(floats(self.scales))
        if self.zeros is not None:
            w = (q - self._each_row(self.zeros.astype(np.float32))) * s
        elif self.offsets is not None:
            w = q * s + self._each_row(floats(self.offsets))
        else:
            w = q * s
        w = w.reshape(n, k)
        if self.perm is None:
            return w
        out = np.empty_like(w)
        out[:, self.perm] = w
        return out

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite: by scales and offsets, and codes of a table that has such."""
        if self.table == "e4m3" and is_no_e4m3(self.codes).any():
            return False
        return is_finite(self.scales) and (self.offsets is None or is_finite(self.offsets))

    def part(self, start: int, end: int) -> QuantizedLinear:
        """Outputs start … end - 1, without the bias; start is a multiple of `rows`."""
        codes, beside = self.codes[start:end], slice(start // self.rows, -(-end // self.rows))
        return replace(
            self,
            codes=codes,
            scales=self.scales[beside],
            zeros=None if self.zeros is None else self.zeros[beside],
            offsets=None if self.offsets is None else self.offsets[beside],
            bias=None,
            rows=min(self.rows, len(codes)),
        )

    def reordered(self, rows: np.ndarray) -> QuantizedLinear:
        """Outputs in another order: int64 [out], the old places of the new ones.

        Raises ValueError where outputs that share a scale would be torn apart.
        """
        beside = rows[:: self.rows] // self.rows
        if not np.array_equal(np.repeat(beside, self.rows)[: len(rows)], rows // self.rows):
            raise ValueError(f"{self.rows} rows that share a scale cannot be put in another order")
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[beside],
            zeros=None if self.zeros is None else self.zeros[beside],
            offsets=None if self.offsets is None else self.offsets[beside],
            bias=None if self.bias is None else self.bias[rows],
        )

    def _each_row(self, beside: np.ndarray) -> np.ndarray:
        """[out, in/group, 1] of what stands beside groups."""
        if self.rows > 1:
            beside = np.repeat(beside, self.rows, axis=0)[: len(self.codes)]
        return beside[..., None]


@dataclass(frozen=True)
class DenseLinear:
    """A weight as stored. weight float16 or float32 [out, in], or uint16 bfloat16 bits when `bf16`."""

    weight: np.ndarray
    bias: np.ndarray | None = None
    bf16: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def form(self) -> Form:
        """Form in which the weight is stored."""
        if self.bf16:
            return Form(16, "bf16")
        return Form(16, "fp16") if self.weight.dtype == np.float16 else Form(32, "fp32")

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        if self.bf16:  # all bits of an exponent
            return not ((self.weight & np.uint16(0x7F80)) == 0x7F80).any()
        return bool(np.isfinite(self.weight).all())

    def part(self, start: int, end: int) -> DenseLinear:
        """Outputs start … end - 1, without the bias."""
        return DenseLinear(self.weight[start:end], bf16=self.bf16)

    def reordered(self, rows: np.ndarray) -> DenseLinear:
        """Outputs in another order: int64 [out], the old places of the new ones."""
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias)

    def dequantize(self) -> np.ndarray:
        """float32 [out, in]."""
        return bf16_to_f32(self.weight) if self.bf16 else self.weight.astype(np.float32)


Linear = QuantizedLinear | DenseLinear


def joined(parts: Sequence[Linear]) -> Linear:
    """The outputs of several linears below each other: as they are stored where all are stored alike, else
    opened, into float32.
    """
    biased = [w.bias for w in parts if w.bias is not None]
    bias = np.concatenate(biased) if len(biased) == len(parts) else None
    first = parts[0]
    if isinstance(first, QuantizedLinear):
        others = [w for w in parts if isinstance(w, QuantizedLinear) and w.form == first.form]
        plain = all(w.rows == 1 and w.perm is None and w.codes.dtype == first.codes.dtype for w in others)
        if plain and len(others) == len(parts):
            zeros = None if first.zeros is None else np.concatenate([w.zeros for w in others])
            offsets = None if first.offsets is None else below([w.offsets for w in others])
            codes, scales = np.concatenate([w.codes for w in others]), below([w.scales for w in others])
            return replace(first, codes=codes, scales=scales, zeros=zeros, offsets=offsets, bias=bias)
    elif all(isinstance(w, DenseLinear) and w.form == first.form for w in parts):
        whole = np.concatenate([w.weight for w in parts if isinstance(w, DenseLinear)])
        return DenseLinear(whole, bias, first.bf16)
    return DenseLinear(np.concatenate([w.dequantize() for w in parts]), bias)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 bit patterns to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def transposed(w: Linear, rows: np.ndarray, heads: int) -> DenseLinear:
    """Of some rows, int64 [heads · n], each matrix [n, k] as [k, n], one below the other. Codes are opened,
    into float32, since the inputs that share a scale are no longer neighbours.
    """
    stored = w.weight if isinstance(w, DenseLinear) else w.dequantize()
    turned = stored[rows].reshape(heads, -1, w.shape[1]).swapaxes(1, 2).reshape(heads * w.shape[1], -1)
    return DenseLinear(np.ascontiguousarray(turned), bf16=isinstance(w, DenseLinear) and w.bf16)


def quantize_int8(weight: np.ndarray, bias: np.ndarray | None = None) -> QuantizedLinear:
    """Round a float32 [out, in] weight to int8 with one fp16 scale for each 32 inputs (GGUF's Q8_0).

    Raises ValueError if `in` is not a multiple of 32, or the weight holds NaN, infinity or what is too large
    for such scales.
    """
    n, k = weight.shape
    if k % Q8_GROUP:
        raise ValueError(f"{k} inputs are not a multiple of {Q8_GROUP}")
    w = weight.astype(np.float32, copy=False).reshape(n, -1, Q8_GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (np.abs(w).max(axis=2) / 127).astype(np.float16)
    if not np.isfinite(scale).all():  # so are those of NaN and infinity
        raise ValueError("the weight holds NaN, infinity, or values too large for fp16 scales")
    s = scale.astype(np.float32)[..., None]
    inv = np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
    codes = np.clip(np.rint(w * inv), -127, 127).astype(np.int8).reshape(n, k)
    return QuantizedLinear(codes, scale, bias=bias, bits=8)


def rounded_to_int8(w: Linear) -> QuantizedLinear:
    """`quantize_int8` of a linear, some rows at a time: never is all of it in floats.

    Raises ValueError as that does.
    """
    rows = w.rows if isinstance(w, QuantizedLinear) else 1
    step = max(rows, PIECE // w.shape[1] // rows * rows)
    parts = [quantize_int8(w.part(a, a + step).dequantize()) for a in range(0, w.shape[0], step)]
    codes = np.concatenate([p.codes for p in parts])
    scales = np.concatenate([p.scales for p in parts if isinstance(p.scales, np.ndarray)])
    return QuantizedLinear(codes, scales, bias=w.bias, bits=8)


def quantize_rtn(weight: np.ndarray, group: int, bias: np.ndarray | None = None) -> QuantizedLinear:
    """Round a float32 [out, in] weight to asymmetric 4-bit groups, each group's range on 0…15 (RTN).

    The zero point is an integer in 0…15 and the range includes 0, as AutoAWQ's `gemm` format stores it.
    Raises ValueError if `in` is not a multiple of `group` or the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if group <= 0 or k % group:
        raise ValueError(f"{k} inputs are not a multiple of group size {group}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    w = weight.astype(np.float32).reshape(n, -1, group)
    lo, hi = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)
    scale = np.maximum((hi - lo) / 15, 1e-5).astype(np.float16)
    s = scale.astype(np.float32)
    zero = np.clip(np.rint(-lo / s), 0, 15)
    codes = np.clip(np.rint(w / s[..., None]) + zero[..., None], 0, 15).astype(np.uint8).reshape(n, k)
    return QuantizedLinear(codes, scale, zeros=zero.astype(np.uint8), bias=bias)
