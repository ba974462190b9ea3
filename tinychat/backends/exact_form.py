"""The form in which every backend stores a weight: the smallest with kernels that holds it exactly.

Layouts differ between backends (which bit lies where); what is stored does not, so it is decided here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.network.weight_form import Form, exact_halves, floats, kind_of
from tinychat.network.weights import DenseLinear, Linear, QuantizedLinear

GROUPS = 32  # a group of whole 32s, or the row in whole 32s: what kernels take

# Codes with kernels: (bits, scale, offset). Scales in fp32 have offsets in fp32, whatever the weight has.
KERNELS = (
    (4, "fp16", "none"),
    (4, "fp16", "zero"),
    (4, "fp16", "fp16"),
    (4, "fp32", "fp32"),
    (8, "fp16", "none"),
    (8, "fp32", "fp32"),
)


@dataclass(frozen=True)
class ExactForm:
    """A weight as kernels take it, before a layout puts its bits in their places.

    form    one of KERNELS, or floats
    codes   [out, in]: uint8 0…15, int8, or the floats: float16, float32, uint16 bits of bfloat16
    scales  [out, in/group], float16 or float32 as the form says; None of floats
    beside  [out, in/group], zeros in uint8 or offsets as the form says; None without
    bias    float32 [out] or None
    perm    int32 [in] or None: column j of codes multiplies input `perm[j]`
    """

    form: Form
    codes: np.ndarray
    scales: np.ndarray | None = None
    beside: np.ndarray | None = None
    bias: np.ndarray | None = None
    perm: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 of floats."""
        return 0 if self.scales is None else self.codes.shape[1] // self.scales.shape[1]

    @staticmethod
    def of(w: Linear, name: str = "") -> ExactForm:
        """The weight, bit for bit. Groups that no kernel takes become floats, as exact and larger.

        name: of the module, for what is said. Raises UnsupportedModelError for codes that no kernel reads.
        """
        bias = None if w.bias is None else np.ascontiguousarray(w.bias, np.float32)
        if isinstance(w, DenseLinear):
            as_stored = w.bf16 or w.weight.dtype == np.float16
            weight = w.weight if as_stored else w.dequantize()
            return ExactForm(w.form, np.ascontiguousarray(weight), bias=bias)
        if w.bits not in (4, 8) or (w.bits == 8) != (w.codes.dtype == np.int8) or w.table or w.rows != 1:
            raise UnsupportedModelError(
                f"The weights {name + ' ' if name else ''}are stored in {w.form}, and no kernel reads those.",
                "Give the model in another quantization, such as GGUF's Q4_K_M or Q8_0.",
            )
        if w.group % GROUPS:
            return ExactForm(Form(32, "fp32"), np.ascontiguousarray(w.dequantize(), np.float32), bias=bias)
        scales, beside = _beside(w)
        offset = "zero" if beside is not None and beside.dtype == np.uint8 else kind_of(beside)
        signed = offset == "none" or w.codes.dtype == np.int8
        form = Form(w.bits, "signed" if signed else "unsigned", w.form.group, kind_of(scales), offset)
        assert (form.bits, form.scale, form.offset) in KERNELS
        perm = None if w.perm is None else np.ascontiguousarray(w.perm, np.int32)
        return ExactForm(form, np.ascontiguousarray(w.codes), scales, beside, bias, perm)


def _beside(w: QuantizedLinear) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales, and zeros or offsets: in halves where these hold them exactly, else both in fp32."""
    halves = exact_halves(w.scales)
    if halves is not None:
        if w.zeros is None and w.offsets is None:
            return np.ascontiguousarray(halves), None
        if w.zeros is not None and w.zeros.max() <= 15:
            zeros = None if (w.zeros == 8).all() else np.ascontiguousarray(w.zeros, np.uint8)
            return np.ascontiguousarray(halves), zeros
        offsets = exact_halves(w.offsets) if w.offsets is not None and w.bits == 4 else None
        if offsets is not None:
            return np.ascontiguousarray(halves), np.ascontiguousarray(offsets)
    scales = np.ascontiguousarray(floats(w.scales))
    if w.offsets is not None:
        return scales, np.ascontiguousarray(floats(w.offsets))
    if w.codes.dtype == np.int8:
        return scales, np.zeros_like(scales)
    return scales, np.float32(-8) * scales if w.zeros is None else -w.zeros.astype(np.float32) * scales
