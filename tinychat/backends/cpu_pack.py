"""Weights in the CPU kernels' layout (`kernels_cpu/src/layout.h`), which every ISA reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.pack_file import Pack
from tinychat.backends.pack_store import Put
from tinychat.kernels_cpu import _native
from tinychat.network.weight_form import Coded, Numbers
from tinychat.network.weights import Linear

# The enumerations of forms.h, by codes or floats, and by what `Form` says of scale and offset
KINDS = {
    "4": 0,
    "8": 1,
    "fp32": 2,
    "fp16": 3,
    "bf16": 4,
    "2": 5,
    "3": 6,
    "5": 7,
    "6": 8,
    "iq4_nl": 9,
    "e2m1": 10,
    "e4m3": 11,
    "nf4": 12,
}
METAS = {
    ("fp16", "none"): 0,
    ("fp16", "zero"): 1,
    ("fp16", "fp16"): 2,
    ("fp32", "fp32"): 3,
    ("none", "none"): 4,
    ("fp32", "none"): 5,
    ("int4", "int4"): 6,
    ("int6", "none"): 7,
    ("int6", "int6"): 9,
    ("int8", "none"): 10,
    ("e8m0", "none"): 11,
    ("e4m3", "none"): 12,
}
SIGNED6 = 8  # ("int6", "none") whose integers are signed

NUMBERS = ("2", "3", "4", "5", "6")
SCALES = [m for m in METAS if m[1] == "none" != m[0]]
PAIRS = [m for m in METAS if m[1] != "none"]
TABLES = ("iq4_nl", "e2m1", "e4m3", "nf4")
KERNELS = Kernels.of([*NUMBERS, "8"], PAIRS + SCALES, [*NUMBERS, "e2m1"], product(TABLES, SCALES))


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A linear for the kernels.

    perm    the order in which it takes its inputs, or None
    stored  the kernels' numbers for the form, tiles, bias
    """

    perm: np.ndarray | None
    stored: tuple[tuple[int, ...], np.ndarray, np.ndarray | None]

    @cached_property
    def native(self) -> Any:
        """The kernels' own object."""
        form, data, bias = self.stored
        return _native.Linear(*form, data, bias)

    def first(self, n: int) -> PackedLinear:
        """The first n outputs, whole tiles of them: the same bytes."""
        (kind, meta, _, k, group), data, bias = self.stored
        form = (kind, meta, n, k, group)
        tiles, bias = data[: _native.packed_bytes(*form)], None if bias is None else bias[:n]
        return PackedLinear(self.perm, (form, tiles, bias))

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
        return PackedLinear(perm, (tuple(e["form"]), data, bias))


def pack(w: Linear, threads: int = 1) -> PackedLinear:
    """One linear for the kernels, in memory."""
    exact = ExactForm.of(w, KERNELS)
    return PackedLinear(exact.perm, (numbers(exact), tiles(exact, threads), exact.bias))


def numbers(w: ExactForm) -> tuple[int, ...]:
    """(kind, meta, n, k, group): how the kernels name a form and its sizes."""
    form = w.form
    kind = KINDS[form.decoding if form.is_float else form.codes]
    meta = METAS[form.scale, form.offset]
    if meta == METAS["int6", "none"] and isinstance(w.scales, Coded) and w.scales.codes.dtype == np.int8:
        meta = SIGNED6
    return (kind, meta, *w.shape, w.group)


def tiles(w: ExactForm, threads: int) -> np.ndarray:
    """uint8: codes and what stands beside them, or floats, in tiles of 16 outputs."""
    form = numbers(w)
    out = _aligned(_native.packed_bytes(*form))
    (scales, times), (offsets, offset_times) = (_parts(a, len(w.codes)) for a in (w.scales, w.beside))
    _native.pack(*form, _bits(w.codes), scales, offsets, times, offset_times, out, threads)
    return out


def _parts(a: Numbers | None, n: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What stands beside groups, and what that is multiplied by, in the integers that the module takes."""
    if not isinstance(a, Coded):
        return _bits(a), None
    times = None if a.times is None else np.broadcast_to(a.times, (n, a.times.shape[1]))
    return np.ascontiguousarray(a.codes), _bits(times)


def _bits(a: np.ndarray | None) -> np.ndarray | None:
    """Halves as integers."""
    if a is None:
        return None
    a = np.ascontiguousarray(a)
    return a.view(np.uint16) if a.dtype == np.float16 else a


def _aligned(size: int) -> np.ndarray:
    """uint8 [size] at a 64-byte boundary."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
