"""Choice of the kind of linear that each stored weight becomes at load, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat.base import arguments
from tinychat.base.errors import CheckpointError, UsageError
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_form import Form
from tinychat.network.weights import (
    Q8_GROUP,
    DenseLinear,
    Linear,
    quantize_rtn,
    rounded_to_int8,
)

DAMAGED = "The file is damaged; pull or convert it again."
RTN_GROUPS = (64, 32)  # the first that divides the inputs


@dataclass(frozen=True)
class WeightPolicy:
    """How weights stored in 16 or 32 bits are run. Stored 4-bit and 8-bit weights always run as they are.

    quantize   "auto" and "int8": body to int8 groups of 32; "rtn": 4-bit groups of 64 or 32; "none": as
               stored
    head_bits  8: embedding and output head to int8 groups of 32; 16: as stored
    """

    quantize: str = "auto"
    head_bits: int = 8

    def __post_init__(self):
        known = ("auto", "rtn", "none")
        arguments.choice("quantize", self.quantize, known, 'Use "auto", "rtn" or "none".')
        if self.head_bits not in (8, 16):
            raise UsageError(f"head_bits={self.head_bits!r} is not known.", "Use 8 or 16.")

    def form(self, form: Form, k: int, kind: str) -> Form:
        """Form of what the methods below give of a weight stored in that form, with k inputs.

        kind: "router", "embedding", "head", or any other for the body.
        """
        if kind == "router":
            return form if form.is_float else Form(32, "fp32")
        table = kind in ("embedding", "head")
        if not form.is_float or (self.head_bits == 16 if table else self.quantize == "none"):
            return form
        if self.quantize == "rtn" and not table:
            group = next((g for g in RTN_GROUPS if k % g == 0), None)
            return form if group is None else Form(4, "unsigned", group, "fp16", "zero")
        return form if k % Q8_GROUP else Form(8, "signed", Q8_GROUP, "fp16")

    def linear(self, checkpoint: Checkpoint, name: str) -> Linear:
        """The body linear `name`, checked and in the kind that runs."""
        w = _checked(checkpoint.linear(name), name)
        if not isinstance(w, DenseLinear) or self.quantize == "none":
            return w
        if self.quantize == "rtn":
            for group in RTN_GROUPS:
                if w.shape[1] % group == 0:
                    return quantize_rtn(w.dequantize(), group, w.bias)
            return w
        return _int8(w, name)

    def router(self, checkpoint: Checkpoint, name: str) -> Linear:
        """The linear that chooses experts, in 16 or 32 bits: a small error may choose others."""
        w = _checked(checkpoint.linear(name), name)
        return w if isinstance(w, DenseLinear) else DenseLinear(w.dequantize(), w.bias)

    def embedding(self, checkpoint: Checkpoint, name: str) -> Linear:
        """The embedding (rows are token ids)."""
        w = _checked(checkpoint.linear(name), name)
        return _int8(w, name) if isinstance(w, DenseLinear) and self.head_bits == 8 else w

    def head(self, checkpoint: Checkpoint, name: str) -> Linear | None:
        """The output head; None when it is the embedding itself (tied)."""
        if checkpoint.config.tie_embeddings or not checkpoint.has(name):
            return None
        return self.embedding(checkpoint, name)


def _int8(w: DenseLinear, name: str) -> Linear:
    if w.shape[1] % Q8_GROUP:
        return w  # rare widths stay as stored
    try:
        return rounded_to_int8(w)
    except ValueError as e:
        raise CheckpointError(f"The weights of {name} cannot run as int8: {e}.", DAMAGED) from None


def _checked(w: Linear, name: str) -> Linear:
    """Refuse NaN and infinity: one bad scale turns every later token into garbage without a word."""
    if w.is_finite() and (w.bias is None or np.isfinite(w.bias).all()):
        return w
    raise CheckpointError(
        f"The weights of {name} hold NaN or infinity.",
        DAMAGED,
    )
