"""The form in which a backend stores a weight: the smallest with kernels that holds it exactly.

Layouts differ between backends: which bit lies where, and what their kernels read. What is stored of a weight
that kernels read is the same for all, so it is decided here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from tinychat.base.errors import CheckpointError
from tinychat.network.weight_form import SUPER, TABLES, Coded, Form, Numbers, exact_halves, floats, kind_of
from tinychat.network.weights import DenseLinear, Linear, QuantizedLinear, rounded_to_int8

PART = 32  # inputs that share a scale of activations: kernels read whole ones
HALF = 16  # the one group that is smaller

Beside = tuple[Numbers, "Numbers | None"]  # scales, and zeros or offsets


@dataclass(frozen=True)
class Kernels:
    """What one backend's kernels read.

    forms    (codes, scale, offset): codes by their table or their bits ("6"), the others in the words of
             `Form`. All backends have ("8", "fp16", "none")
    halves   codes that are read in groups of 16 too, beside multiples of 32
    """

    forms: frozenset[tuple[str, str, str]]
    halves: frozenset[str] = frozenset()

    @staticmethod
    def of(
        codes: Iterable[str],
        besides: Iterable[tuple[str, str]],
        halves: Iterable[str] | None = None,
        more: Iterable[tuple[str, tuple[str, str]]] = (),
    ) -> Kernels:
        """Any of the codes beside any of the pairs of scale and offset, and `more` such forms; halves: all of
        these codes, unless they are given.
        """
        forms = frozenset((c, *b) for c, b in [*product(codes, besides), *more])
        return Kernels(forms, frozenset(codes if halves is None else halves))

    def hold(self, form: Form, k: int) -> bool:
        """Whether weights of that form and k inputs run as they are; others are rounded when packed."""
        if form.is_float or not _whole(form.group or k, k):
            return True  # floats hold them
        if (form.group or k) % PART and form.codes not in self.halves:
            return False
        return any(words in self.forms for words in _said(form))

    def form(self, form: Form, k: int) -> Form:
        """Form in which weights of that form and k inputs are stored, as far as it follows without their
        numbers: fp32 scales that halves hold exactly are stored as halves.
        """
        if form.is_float:
            return form
        if not _whole(form.group or k, k):
            return Form(32, "fp32")
        if not self.hold(form, k):
            return Form(8, "signed", PART, "fp16")
        _, scale, offset = next(words for words in _said(form) if words in self.forms)
        signed = offset == "none" or form.bits == 8
        decoding = form.codes if form.codes in TABLES else "signed" if signed else "unsigned"
        return Form(form.bits, decoding, form.group, scale, offset)


@dataclass(frozen=True)
class ExactForm:
    """A weight as kernels take it, before a layout puts its bits in their places.

    form    floats, or one of the `Kernels`; "signed" codes of less than 8 bits are off by 2^(bits - 1)
    codes   [out, in]: uint8 0…2^bits - 1, int8 of 8 bits, or the floats: float16, float32, uint16 bits of
            bfloat16
    scales  [out, in/group], float16, float32 or `Coded` as the form says; None of floats. Integers have an
            fp16 for each 256 inputs, e4m3 codes one fp32 for a row or for all
    beside  [out, in/group], zeros in uint8 0…15, or offsets as the form says; None without
    bias    float32 [out] or None
    perm    int32 [in] or None: column j of codes multiplies input `perm[j]`
    rounded whether the weight's own form has no kernels: what is stored was rounded to int8 groups of 32
    """

    form: Form
    codes: np.ndarray
    scales: Numbers | None = None
    beside: Numbers | None = None
    bias: np.ndarray | None = None
    perm: np.ndarray | None = None
    rounded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 of floats."""
        return 0 if self.scales is None else self.codes.shape[1] // self.scales.shape[1]

    @staticmethod
    def of(w: Linear, kernels: Kernels, name: str = "") -> ExactForm:
        """The weight, bit for bit where the kernels read its codes, else rounded to int8 groups of 32. Groups
        that no kernel takes become floats, as exact and larger.

        name: of the module, for what is said. Raises CheckpointError for NaN or infinity that is rounded.
        """
        bias = None if w.bias is None else np.ascontiguousarray(w.bias, np.float32)
        if isinstance(w, DenseLinear):
            as_stored = w.bf16 or w.weight.dtype == np.float16
            weight = w.weight if as_stored else w.dequantize()
            return ExactForm(w.form, np.ascontiguousarray(weight), bias=bias)
        if not _whole(w.group, w.shape[1]):
            return ExactForm(Form(32, "fp32"), np.ascontiguousarray(w.dequantize(), np.float32), bias=bias)
        if not kernels.hold(w.form, w.shape[1]):
            return _rounded(w, kernels, name)
        signed = _signed_bytes(w)
        code = w.form.codes
        pairs = ((_words(pair), pair) for pair in _besides(signed))
        (scale, offset), (scales, beside) = next(p for p in pairs if (code, *p[0]) in kernels.forms)
        plain = "signed" if offset == "none" or signed.codes.dtype == np.int8 else "unsigned"
        form = Form(w.bits, w.table or plain, w.form.group, scale, offset)
        perm = None if w.perm is None else np.ascontiguousarray(w.perm, np.int32)
        return ExactForm(form, np.ascontiguousarray(signed.codes), scales, beside, bias, perm)


def _said(form: Form) -> list[tuple[str, str, str]]:
    """Words of `Kernels.forms` that hold weights of a form exactly, the smallest first."""
    wide = [("fp32", "none")] if form.offset == "none" else []
    return [(form.codes, *words) for words in [(form.scale, form.offset), *wide, ("fp32", "fp32")]]


def _whole(group: int, k: int) -> bool:
    """Whether some kernels take groups of that size."""
    return k % PART == 0 and (group == HALF or group % PART == 0)


def _rounded(w: QuantizedLinear, kernels: Kernels, name: str) -> ExactForm:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            int8 = rounded_to_int8(w)
    except ValueError as e:
        raise CheckpointError(
            f"The weights {name + ' ' if name else ''}cannot run as int8: {e}.",
            "The file is damaged; pull or convert it again.",
        ) from None
    return replace(ExactForm.of(int8, kernels, name), rounded=True)


def _signed_bytes(w: QuantizedLinear) -> QuantizedLinear:
    """The weight with int8 codes where it has unsigned ones of 8 bits, and with scales for each row."""
    if w.rows > 1:
        zeros, offsets = (None if a is None else _each_row(a, w) for a in (w.zeros, w.offsets))
        w = replace(w, scales=_each_row(w.scales, w), zeros=zeros, offsets=offsets, rows=1)
    if w.bits < 8 or w.table or w.codes.dtype == np.int8:
        return w
    codes = (w.codes ^ np.uint8(128)).view(np.int8)
    scales, shift = floats(w.scales), np.float32(128)
    if w.zeros is not None:
        offsets = (shift - w.zeros.astype(np.float32)) * scales
    elif w.offsets is not None:
        offsets = floats(w.offsets) + shift * scales
    else:
        return replace(w, codes=codes)
    return replace(w, codes=codes, zeros=None, offsets=offsets if offsets.any() else None)


def _each_row(beside: Numbers, w: QuantizedLinear) -> np.ndarray:
    a = floats(beside) if isinstance(beside, Coded) else beside
    return np.repeat(a, w.rows, axis=0)[: len(w.codes)]


def _words(pair: Beside) -> tuple[str, str]:
    scales, beside = pair
    zero = isinstance(beside, np.ndarray) and beside.dtype == np.uint8
    return kind_of(scales), "zero" if zero else kind_of(beside)


def _besides(w: QuantizedLinear) -> Iterator[Beside]:
    """Scales, and zeros or offsets, in every way that holds them exactly, the smallest first."""
    off_by = 0 if w.table or w.codes.dtype == np.int8 else 1 << (w.bits - 1)  # without zeros and offsets
    zeros = None if w.zeros is None or (off_by and (w.zeros == off_by).all()) else w.zeros
    none = zeros is None and w.offsets is None
    k = w.shape[1]
    if none and _for_kernels(w.scales, k):
        yield _signed(w.scales), None
    elif w.offsets is not None and all(_for_kernels(a, k) and _unsigned(a) for a in (w.scales, w.offsets)):
        yield w.scales, w.offsets
    scales, halves = floats(w.scales), exact_halves(w.scales)
    if halves is not None:
        halves = np.ascontiguousarray(halves)
        if none:
            yield halves, None
        elif zeros is not None and zeros.max() <= 15:
            yield halves, np.ascontiguousarray(zeros, np.uint8)
        elif w.offsets is not None:
            offsets = exact_halves(w.offsets)
            if offsets is not None:
                yield halves, np.ascontiguousarray(offsets)
    scales = np.ascontiguousarray(scales)
    if none:
        yield scales, None
        yield scales, np.zeros_like(scales) if not off_by else np.float32(-off_by) * scales
    elif zeros is not None:
        yield scales, -zeros.astype(np.float32) * scales
    elif w.offsets is not None:
        yield scales, np.ascontiguousarray(floats(w.offsets))


def _for_kernels(numbers: Numbers, k: int) -> bool:
    """Whether these are coded as kernels read them: one number above 256 inputs, above the row for e4m3."""
    if not isinstance(numbers, Coded):
        return False
    if numbers.times is None:
        return True
    above = numbers.times.shape[1]
    if numbers.kind == "e4m3":
        return above == 1
    small = numbers.kind != "int8" or not _unsigned(numbers) or numbers.codes.max() < 128
    return above * SUPER == k and small


def _signed(numbers: Numbers) -> Numbers:
    """Integers of 8 bits as int8."""
    if isinstance(numbers, Coded) and numbers.kind == "int8":
        return replace(numbers, codes=numbers.codes.view(np.int8))
    return numbers


def _unsigned(numbers: Numbers) -> bool:
    return isinstance(numbers, Coded) and numbers.codes.dtype == np.uint8
