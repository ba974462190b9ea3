"""Weights in the CPU kernels' layout (`kernels_cpu/src/layout.h`), which every ISA reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.pack_file import Pack
from tinychat.backends.pack_store import Put
from tinychat.kernels_cpu import _native
from tinychat.network.weight_form import Coded, Numbers
from tinychat.network.weights import Linear

# The enumerations of layout.h, by what `Form` says of codes, and of scale and offset
KINDS = {"4-bit": 0, "8-bit": 1, "fp32": 2, "fp16": 3, "bf16": 4}
METAS = {
    ("fp16", "none"): 0,
    ("fp16", "zero"): 1,
    ("fp16", "fp16"): 2,
    ("fp32", "fp32"): 3,
    ("none", "none"): 4,
}
KERNELS = Kernels(
    frozenset(
        {
            *(("4", *beside) for beside in METAS if beside[0] != "none"),
            ("8", "fp16", "none"),
            ("8", "fp32", "fp32"),
        }
    )
)


@dataclass(frozen=True)
class PackedLinear:
    """A linear for the kernels. perm: the order in which it takes its inputs, or None."""

    native: Any
    perm: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.native.shape


class CpuLayout:
    """Implements `Layout`. threads: that put bits in their places."""

    name = "lanes16"
    kernels = KERNELS

    def __init__(self, threads: int = 1):
        self.threads = threads

    def entry(self, w: ExactForm, put: Put) -> dict[str, Any]:
        """Places of tiles, bias and order of inputs, and the kernels' numbers for the form."""
        return {
            "form": list(numbers(w)),
            "data": put(tiles(w, self.threads)),
            "bias": put(w.bias),
            "perm": put(w.perm),
        }


class CpuWeights:
    """Gives a model file its weights out of a pack."""

    def __init__(self, pack: Pack):
        self.pack = pack

    def vector(self, name: str) -> np.ndarray:
        """float32 [n]."""
        return self.pack.vector(name)

    def linear(self, *names: str) -> tuple[PackedLinear, ...]:
        """Linears that share an input."""
        return tuple(self._linear(n) for n in names)

    def router(self, name: str) -> tuple[PackedLinear, ...]:
        """The linear that chooses experts."""
        return (self._linear(name),)

    def embedding(self, name: str) -> tuple[PackedLinear, ...]:
        """The embedding (rows are token ids)."""
        return (self._linear(name),)

    def head(self, name: str, tied_to: Any) -> Any:
        """The output head, or the embedding where they are one."""
        return (self._linear(name),) if name in self.pack.index["linears"] else tied_to

    def _linear(self, name: str) -> PackedLinear:
        e = self.pack.index["linears"][name]
        bias = None if e["bias"] is None else self.pack.array(e["bias"], np.float32)
        perm = None if e["perm"] is None else self.pack.array(e["perm"], np.int32)
        data = self.pack.array(e["data"], np.uint8)
        return PackedLinear(_native.Linear(*e["form"], data, bias), perm)


def pack(w: Linear, threads: int = 1) -> PackedLinear:
    """One linear for the kernels, in memory."""
    exact = ExactForm.of(w, KERNELS)
    return PackedLinear(_native.Linear(*numbers(exact), tiles(exact, threads), exact.bias), exact.perm)


def numbers(w: ExactForm) -> tuple[int, ...]:
    """(kind, meta, n, k, group): how the kernels name a form and its sizes."""
    form = w.form
    kind = KINDS[form.decoding if form.is_float else f"{form.bits}-bit"]
    return (kind, METAS[form.scale, form.offset], *w.shape, w.group)


def tiles(w: ExactForm, threads: int) -> np.ndarray:
    """uint8: codes and what stands beside them, or floats, in tiles of 16 outputs."""
    form = numbers(w)
    out = _aligned(_native.packed_bytes(*form))
    _native.pack(*form, _bits(w.codes), _bits(w.scales), _bits(w.beside), out, threads)
    return out


def _bits(a: Numbers | None) -> np.ndarray | None:
    """Halves as the integers that the kernels' module takes."""
    assert not isinstance(a, Coded)  # KERNELS have none
    return a.view(np.uint16) if a is not None and a.dtype == np.float16 else a


def _aligned(size: int) -> np.ndarray:
    """uint8 [size] at a 64-byte boundary."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
