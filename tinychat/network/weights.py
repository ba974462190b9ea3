"""The three kinds of linear that readers make and backends run, wherever they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Q8_GROUP = 32


class _Grouped:
    codes: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape

    @property
    def group(self) -> int:
        """Inputs that share one scale."""
        return self.codes.shape[1] // self.scales.shape[1]


@dataclass(frozen=True)
class QuantizedLinear(_Grouped):
    """Canonical 4-bit weight: `w = (q - zero) * scale`, or `w = q * scale + offset`.

    codes   uint8 [out, in], values 0…15
    scales  float16 or float32 [out, in/group], as stored
    zeros   uint8 [out, in/group], 0…16 (symmetric formats: constant 8); None when `offsets` is given
    offsets float16 or float32 [out, in/group]; None when `zeros` is given
    bias    float32 [out] or None
    perm    int32 [in] or None: column j of `codes` multiplies input `perm[j]` (GPTQ desc_act)
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None
    bias: np.ndarray | None = None
    perm: np.ndarray | None = None

    def __post_init__(self):
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        if self.scales.shape[0] != n or groups == 0 or k % groups:
            raise ValueError(f"scales {self.scales.shape} do not divide codes {self.codes.shape} into groups")
        if (self.zeros is None) == (self.offsets is None):
            raise ValueError("a QuantizedLinear has either zeros or offsets")
        for a in (self.zeros, self.offsets):
            if a is not None and a.shape != self.scales.shape:
                raise ValueError(f"zeros or offsets {a.shape} do not match scales {self.scales.shape}")

    def dequantize(self) -> np.ndarray:
        """float32 [out, in], in the order of the layer's inputs (`perm` undone)."""
        n, k = self.codes.shape
        q = self.codes.reshape(n, -1, self.group).astype(np.float32)
        s = self.scales.astype(np.float32)[..., None]
        if self.zeros is not None:
            w = (q - self.zeros.astype(np.float32)[..., None]) * s
        else:
            w = q * s + self.offsets.astype(np.float32)[..., None]
        w = w.reshape(n, k)
        if self.perm is None:
            return w
        out = np.empty_like(w)
        out[:, self.perm] = w
        return out


@dataclass(frozen=True)
class Int8Linear(_Grouped):
    """Symmetric int8, `w = q * scale`. codes int8 [out, in]; scales float16 or float32 [out, in/32]."""

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self):
        n, k = self.codes.shape
        if self.scales.shape[0] != n or self.scales.shape[1] == 0 or k % self.scales.shape[1]:
            raise ValueError(f"scales {self.scales.shape} do not divide codes {self.codes.shape} into groups")

    def dequantize(self) -> np.ndarray:
        """float32 [out, in]."""
        n, k = self.codes.shape
        q = self.codes.reshape(n, -1, self.group).astype(np.float32)
        return (q * self.scales.astype(np.float32)[..., None]).reshape(n, k)


@dataclass(frozen=True)
class DenseLinear:
    """A weight as stored. weight float16 or float32 [out, in], or uint16 bfloat16 bits when `bf16`."""

    weight: np.ndarray
    bias: np.ndarray | None = None
    bf16: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def dequantize(self) -> np.ndarray:
        """float32 [out, in]."""
        return bf16_to_f32(self.weight) if self.bf16 else self.weight.astype(np.float32)


Linear = QuantizedLinear | Int8Linear | DenseLinear


@dataclass(frozen=True)
class StackedLinear:
    """Linears that share an input; their outputs are laid side by side (q, k, v; gate, up)."""

    parts: tuple[Linear, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(sum of out, in)."""
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 bit patterns to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize_int8(weight: np.ndarray, bias: np.ndarray | None = None) -> Int8Linear:
    """Round a float32 [out, in] weight to int8 with one fp16 scale for each 32 inputs (GGUF's Q8_0).

    Raises ValueError if `in` is not a multiple of 32 or the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if k % Q8_GROUP:
        raise ValueError(f"{k} inputs are not a multiple of {Q8_GROUP}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    w = weight.astype(np.float32).reshape(n, -1, Q8_GROUP)
    scale = (np.abs(w).max(axis=2) / 127).astype(np.float16)
    s = scale.astype(np.float32)[..., None]
    inv = np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
    codes = np.clip(np.rint(w * inv), -127, 127).astype(np.int8).reshape(n, k)
    return Int8Linear(codes, scale, bias)


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
