"""Forms of a weight: codes and how they decode, what stands beside them and how that is stored.

A form is a sentence of this algebra; readers say one for each weight, and backends run those that they have
kernels for (`tinychat.backends.exact_form`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROW = 0  # as a group: one scale for all inputs of an output
CODE_BITS = (2, 3, 4, 5, 6, 8)
SUPER = 256  # inputs that share a super-scale, in every format that has one


def _minifloats(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """float32 values of all codes of a small float without infinities, sign first."""
    code = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    size = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    values = np.ldexp(size.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    return np.where(code >> (exponent_bits + mantissa_bits), -values, values).astype(np.float32)


def _e4m3() -> np.ndarray:
    values = _minifloats(4, 3, 7)
    values[[0x7F, 0xFF]] = np.nan
    return values


_NF4 = (
    "-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0 "
    "0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1"
)

# float32 [2^bits]: the value of each code. e2m1, e4m3: OCP's floats of 4 and 8 bits (MXFP4, NVFP4, FP8);
# iq4_nl: llama.cpp's 16 levels for bell-shaped weights; nf4: bitsandbytes' 16 quantiles of a normal
# distribution.
TABLES = {
    "e2m1": _minifloats(2, 1, 1),
    "e4m3": _e4m3(),
    "iq4_nl": np.array(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
    ),
    "nf4": np.array(_NF4.split(), np.float32),
}

_LARGEST_POWER = 252  # of e8m0: the largest e2m1, 6, times the next one is infinite in float32

# How a scale or an offset is stored → its bits, and what it is multiplied by.
NUMBERS = {
    "fp16": (16, None),
    "fp32": (32, None),
    "int4": (4, "fp16"),
    "int6": (6, "fp16"),
    "int8": (8, "fp16"),
    "e8m0": (8, None),
    "e4m3": (8, "fp32"),
}
FLOATS = {"fp16": 16, "bf16": 16, "fp32": 32}  # weights that are stored without codes


@dataclass(frozen=True)
class Form:
    """How the numbers of a weight are stored.

        w = value(code) · scale             offset "none"
        w = (code - zero) · scale           offset "zero"
        w = value(code) · scale + offset    any other offset

    bits      of a code: 2, 3, 4, 5, 6 or 8; 16 or 32 of a float
    decoding  the value of a code: "unsigned" 0…2^bits - 1, "signed" -2^(bits - 1)…2^(bits - 1) - 1, or by a
              table ("e2m1", "e4m3", "iq4_nl", "nf4"); of a weight stored in floats "fp16", "bf16" or "fp32"
    group     inputs that share a scale: 16, 32, 64, 128, …, or ROW
    rows      outputs that share a scale; ROW for all of them
    scale     "fp16", "fp32"; "int4", "int6" or "int8" times an fp16 for each 256 inputs; "e8m0" (a power of
              two); "e4m3" times one fp32; "none" beside floats
    offset    "none", "zero" (an unsigned integer of a code's bits), or one of the words for a scale

    Raises ValueError for words that it does not know.
    """

    bits: int
    decoding: str
    group: int = ROW
    scale: str = "none"
    offset: str = "none"
    rows: int = 1

    def __post_init__(self) -> None:
        if self.is_float:
            known = self.bits == FLOATS[self.decoding] and self.scale == self.offset == "none"
        else:
            plain = self.decoding in ("signed", "unsigned")
            known = self.bits in CODE_BITS and self.scale in NUMBERS
            known &= plain or TABLES.get(self.decoding, np.empty(0)).size == 1 << self.bits
            known &= self.offset == "none" or self.offset in NUMBERS or (plain and self.offset == "zero")
        if not known or self.group < 0 or self.rows < 0:
            raise ValueError(f"there is no such form of weights: {self!r}")

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as floats, without codes."""
        return self.decoding in FLOATS

    @property
    def codes(self) -> str:
        """What tells kernels codes from codes: their table, or their bits ("6")."""
        return self.decoding if self.decoding in TABLES else str(self.bits)

    def n_bytes(self, n: int, k: int) -> int:
        """Bytes of a weight of n outputs and k inputs, without padding."""
        bits = n * k * self.bits
        if not self.is_float:
            rows = 1 if self.rows == ROW else -(-n // self.rows)
            for kind in (self.scale, self.offset):
                bits += self._bits_beside(kind, rows, k)
        return -(-bits // 8)

    def _bits_beside(self, kind: str, rows: int, k: int) -> int:
        """Bits of all scales, or of all offsets."""
        if kind == "none":
            return 0
        count = rows * (1 if self.group == ROW else k // self.group)
        each, times = NUMBERS.get(kind, (self.bits, None))
        if times == "fp16":
            return count * each + rows * -(-k // SUPER) * 16
        return count * each + (32 if times else 0)

    def __str__(self) -> str:
        """Such as "4-bit, groups of 32, fp16 scale and offset"."""
        if self.is_float:
            return self.decoding
        table = f" {self.decoding}" if self.decoding in TABLES else ""
        return f"{self.bits}-bit{table}, {self._groups()}, {self._beside()}"

    def _groups(self) -> str:
        if self.rows == 1:
            return "one group a row" if self.group == ROW else f"groups of {self.group}"
        if self.rows == self.group == ROW:
            return "one group"
        return f"blocks of {self.rows or 'all'} × {self.group or 'all'}"

    def _beside(self) -> str:
        scale, offset = _said(self.scale), _said(self.offset)
        if self.offset == "none":
            return scale.format("scale")
        if self.offset == "zero":
            return scale.format("scale") + " and zero point"
        if scale == offset:
            return scale.format("scale and offset")
        return f"{scale.format('scale')} and {offset.format('offset')}"


def _said(kind: str) -> str:
    """A pattern for what is stored so."""
    bits, times = NUMBERS.get(kind, (0, None))
    what = f"{bits}-bit" if kind.startswith("int") else kind
    return f"{what} {{}}" + (f" × {times}" if times else "")


@dataclass(frozen=True)
class Coded:
    """Scales or offsets that are not stored as floats: `value(code) · times`.

    kind    "int4", "int6", "int8", "e8m0" or "e4m3"
    codes   uint8 (or int8, of integers) [rows, columns]
    times   float16 or float32 [rows or 1, columns / m]: each is for m columns; None: e8m0 stands alone

    Raises ValueError where these do not fit.
    """

    kind: str
    codes: np.ndarray
    times: np.ndarray | None = None

    def __post_init__(self) -> None:
        needed = NUMBERS[self.kind][1]
        rows, columns = self.codes.shape
        if self.codes.dtype not in (np.uint8, np.int8) or _word(self.times) != needed:
            raise ValueError(f"{self.kind} codes of {self.codes.dtype} with {_word(self.times)} beside them")
        if self.times is not None:
            above, over = self.times.shape
            if above not in (1, rows) or over == 0 or columns % over:
                raise ValueError(f"numbers {self.times.shape} do not divide codes {self.codes.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.codes.shape

    def __getitem__(self, rows: slice | np.ndarray) -> Coded:
        """Some of the rows."""
        times = self.times if self.times is None or len(self.times) == 1 else self.times[rows]
        return Coded(self.kind, self.codes[rows], times)

    def floats(self) -> np.ndarray:
        """float32 [rows, columns]."""
        if self.kind == "e8m0":
            powers = np.ldexp(np.float32(1), np.minimum(self.codes, 254).astype(np.int32) - 127)
            return np.where(self.codes == 255, np.float32(np.nan), powers).astype(np.float32)
        values = TABLES["e4m3"][self.codes] if self.kind == "e4m3" else self.codes.astype(np.float32)
        assert self.times is not None
        times = self.times.astype(np.float32)
        return np.repeat(times, values.shape[1] // times.shape[1], axis=1) * values

    def is_finite(self) -> bool:
        """Whether all are finite, and so is any code times them. Opens no numbers."""
        if self.times is not None and not _leave_room(self.times):
            return False
        if self.kind == "e8m0":
            return int(self.codes.max(initial=0)) <= _LARGEST_POWER
        return self.kind != "e4m3" or not is_no_e4m3(self.codes).any()


Numbers = np.ndarray | Coded  # float16 or float32 as they are, or coded


def below(parts: Sequence[Numbers | None]) -> Numbers:
    """Scales or offsets of one kind, below each other."""
    coded = [p for p in parts if isinstance(p, Coded)]
    if not coded:
        return np.concatenate([p for p in parts if isinstance(p, np.ndarray)])
    times = [np.broadcast_to(p.times, (len(p.codes), p.times.shape[1])) for p in coded if p.times is not None]
    codes = np.concatenate([p.codes for p in coded])
    return Coded(coded[0].kind, codes, np.concatenate(times) if times else None)


def floats(numbers: Numbers) -> np.ndarray:
    """float32 of scales or offsets, however they are stored."""
    return numbers.floats() if isinstance(numbers, Coded) else numbers.astype(np.float32)


def is_finite(numbers: Numbers) -> bool:
    """Whether scales or offsets are finite, and so is any code times them, however they are stored."""
    return numbers.is_finite() if isinstance(numbers, Coded) else _leave_room(numbers)


def _leave_room(numbers: np.ndarray) -> bool:
    """Whether floats are finite, and float32 ones also times the largest code (448) and scale (448)."""
    if numbers.dtype == np.float32:
        with np.errstate(over="ignore"):
            numbers = numbers * np.float32(1 << 18)
    return bool(np.isfinite(numbers).all())


def is_no_e4m3(codes: np.ndarray) -> np.ndarray:
    """Which codes of e4m3 are NaN, of either sign."""
    return (codes & np.uint8(0x7F)) == 0x7F


def kind_of(numbers: Numbers | None) -> str:
    """The word of `Form` for scales or offsets."""
    if isinstance(numbers, Coded):
        return numbers.kind
    return _word(numbers) or "none"


def _word(a: np.ndarray | None) -> str | None:
    """The word for an array of floats."""
    if a is None:
        return None
    return {"float16": "fp16", "float32": "fp32"}.get(str(a.dtype), str(a.dtype))


def exact_halves(numbers: Numbers) -> np.ndarray | None:
    """float16 of scales or offsets, or None if that does not hold them exactly."""
    if isinstance(numbers, np.ndarray) and numbers.dtype == np.float16:
        return numbers
    wide = floats(numbers)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    return half if (half.astype(np.float32) == wide).all() else None
