"""Weights in the CUDA kernels' layout, and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.pack_store import Put
from tinychat.kernels_cuda import layout, linear
from tinychat.kernels_cuda.driver import Memory, OutOfMemoryError
from tinychat.kernels_cuda.layout import TILE, Form, Shape
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.modules import Modules
from tinychat.network import weight_form
from tinychat.network.weight_form import TABLES, Coded
from tinychat.network.weights import Linear, bf16_to_f32

BESIDES = (
    ("fp16", "none"),
    ("fp16", "zero"),
    ("fp16", "fp16"),
    ("fp32", "none"),
    ("fp32", "fp32"),
    ("int4", "int4"),
    ("int6", "none"),
    ("int6", "int6"),
    ("int8", "none"),
    ("e8m0", "none"),
    ("e4m3", "none"),
)
CODES = ("2", "3", "4", "5", "6", "8", *(t for t in TABLES if t.upper() in layout.TABLES))
KERNELS = Kernels.of(CODES, BESIDES, CODES)
PARTS = {"codes": np.uint8, "meta": np.uint8, "zeros": np.uint8, "bias": np.float32, "perm": np.int32}
EXPERT = ".experts."  # in the name of a linear that is one of many
PIECE, ALIGNED = 16 << 20, 256  # bytes

Packed = tuple[Shape, dict[str, "np.ndarray | None"]]
Pieces = tuple[Shape, dict[str, list[np.ndarray]]]  # of each part, one behind the other


def _joined(packed: list[Packed]) -> list[Pieces]:
    """Weights of one form below each other, where the upper one ends with a whole tile."""
    out: list[Pieces] = []
    for shape, parts in packed:
        pieces = {name: [] if a is None else [a] for name, a in parts.items()}
        if out and not pieces["perm"]:
            above, over = out[-1]
            alike = (above.form, above.k, above.group) == (shape.form, shape.k, shape.group)
            if alike and above.n % TILE == 0 and not over["perm"]:
                both = {name: over[name] + pieces[name] for name in ("codes", "meta", "zeros", "perm")}
                if over["bias"] or pieces["bias"]:
                    pairs = ((above, over), (shape, pieces))
                    both["bias"] = [a for s, p in pairs for a in p["bias"] or [np.zeros(s.n, np.float32)]]
                out[-1] = replace(above, n=above.n + shape.n), {"bias": [], **both}
                continue
        out.append((shape, pieces))
    return out


class Source(Protocol):
    """What a pack is to the loader: `pack_file.Pack`, or its outline alone (`cuda_room.Outline`)."""

    index: dict[str, Any]

    def vector(self, name: str) -> np.ndarray:
        """float32 [n]."""
        ...

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """One part, flat."""
        ...


class Loader:
    """Gives a model file its weights on the device, out of a pack: one module at a time, straight from the
    mapped file.
    """

    def __init__(
        self, pack: Source, modules: Modules, away: frozenset[str] = frozenset(), spare: int | None = None
    ):
        """away: linears that stay in RAM, each by the first of the names that it is asked for by; kernels
        read them over the bus. spare: so does whatever the device turns out to have no room for, beside as
        many bytes for what comes behind the weights; None: that is an error.
        """
        self.pack, self.modules, self.away = pack, modules, away
        self.spills = spare is not None
        self._spare = modules.device.allocate(spare) if spare else None
        self.sources: list[tuple[str, dict[str, str]]] = []  # that the weights need, and how compiled
        self.sizes: dict[str, int] = {}  # bytes of linears, by the first of their names
        self.on_device = self.in_ram = 0  # bytes of weights
        self._pieces = {False: Memory(0, 0), True: Memory(0, 0)}

    def vector(self, name: str) -> Memory:
        """float32 [n]."""
        v = self.pack.vector(name)
        memory = self._allocate(v.nbytes)
        self.modules.device.upload(memory, v)
        return memory

    def linear(self, *names: str) -> tuple[DeviceLinear, ...]:
        """Linears that share an input; neighbours that can be one weight are."""
        packed = _joined([self._read(n) for n in names])
        source = "experts.cu" if EXPERT in names[0] else "linear.cu"
        self.sources += [(source, shape.defines) for shape, _ in packed]
        self.sizes[names[0]] = sum(a.nbytes for _, parts in packed for part in parts.values() for a in part)
        allocate = partial(self._allocate, away=names[0] in self.away)
        return tuple(linear.upload(self.modules, *p, allocate) for p in packed)

    def router(self, name: str) -> tuple[DeviceLinear, ...]:
        """The linear that chooses experts."""
        self.sources.append(("routes.cu", {}))
        return self.linear(name)

    def embedding(self, name: str) -> tuple[DeviceLinear, ...]:
        """The embedding (rows are token ids)."""
        (w,) = self.linear(name)
        self.sources.append(("embed.cu", w.shape.form.defines))
        return (w,)

    def head(self, name: str, tied_to: Any) -> Any:
        """The output head, or the embedding where they are one."""
        return self.linear(name) if name in self.pack.index["linears"] else tied_to

    def release(self) -> None:
        """All weights are there: what was to be spared is free."""
        self._spare = None

    def _allocate(self, size: int, away: bool = False) -> Memory:
        """Memory. Small weights share pieces: the driver rounds each allocation up to its pages."""
        if size > PIECE // 8:
            return self._take(size, away)
        if self._pieces[away].size < size:
            self._pieces[away] = self._take(PIECE, away)
        memory = self._pieces[away][:size]
        self._pieces[away] = self._pieces[away][-(-size // ALIGNED) * ALIGNED :]
        return memory

    def _take(self, size: int, away: bool) -> Memory:
        device = self.modules.device
        if not away:
            try:
                memory = device.allocate(size)
                self.on_device += size
                return memory
            except OutOfMemoryError:
                if not self.spills:
                    raise
        self.in_ram += size
        return device.shared(size)

    def _read(self, name: str) -> Packed:
        e = self.pack.index["linears"][name]
        *form, n, k, group = e["form"]
        parts = {
            part: None if e[part] is None else self.pack.array(e[part], kind) for part, kind in PARTS.items()
        }
        return Shape(Form(*form), n, k, group), parts


class CudaLayout:
    """Implements `Layout`: kernels_cuda/layout.py."""

    name = "cuda2"
    kernels = KERNELS

    def entry(self, w: ExactForm, put: Put) -> dict[str, Any]:
        """Places of PARTS, and the fields of `Shape`."""
        shape, parts = packed(w)
        where = {part: put(parts[part]) for part in PARTS}
        form = [*astuple(shape.form), shape.n, shape.k, shape.group]
        return {**where, "form": form, "data": where["codes"]}


def shape_of(form: weight_form.Form, n: int, k: int) -> Shape:
    """The shape of a weight that is stored in such a form, as far as it follows without its numbers."""
    if form.is_float:
        return Shape(Form(32 if form.bits == 32 else 16), n, k, k)
    words = [kind.upper() for kind in (form.scale, form.offset) if kind != "none"]
    word = "ZERO" if form.offset == "zero" else "_".join(words)
    group = form.group or k
    small = 16 if group == 16 else 32 if word in layout.CODED else 0
    return Shape(Form(form.bits, form.decoding.upper(), word, small), n, k, group)


def pack(w: Linear) -> Packed:
    """One linear for the kernels: its shape, and its arrays codes, meta, zeros, bias, perm."""
    return packed(ExactForm.of(w, KERNELS))


def packed(w: ExactForm) -> Packed:
    """The arrays of a weight in the kernels' layout, and its shape."""
    n, k = w.shape
    parts: dict[str, np.ndarray | None] = dict.fromkeys(("meta", "zeros"))
    parts |= {"bias": w.bias, "perm": w.perm}
    if w.scales is None:
        form, parts["codes"] = _floats(w)
        return Shape(form, n, k, k), parts
    word, codes, floats = _beside(w)
    coded = word in layout.CODED
    form = Form(w.form.bits, w.form.decoding.upper(), word, 16 if w.group == 16 else 32 if coded else 0)
    shape = Shape(form, n, k, w.group)
    parts["codes"] = _banded(w.codes, lambda a: layout.pack_codes(a, form))
    if coded:
        parts["meta"] = layout.pack_coded(shape, codes, floats)
    else:
        parts["meta"] = layout.pack_meta(*floats)
        parts["zeros"] = layout.pack_zeros(codes[0]) if codes else None
    return shape, parts


def _beside(w: ExactForm) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """layout.cuh's word for scales and offsets, the integers that are stored of them (zeros too), the floats.

    Integers with a sign that the kernels do not expect (no file has those) become floats.
    """
    numbers = [a for a in (w.scales, w.beside) if a is not None]
    floats = [a for a in numbers if isinstance(a, np.ndarray)]
    coded = [a for a in numbers if isinstance(a, Coded)]
    if w.form.offset == "zero":
        return "ZERO", floats[1:], floats[:1]
    word = "_".join(kind.upper() for kind in (w.form.scale, w.form.offset) if kind != "none")
    if not coded:
        return word, [], floats
    bits, _, _, shift = layout.CODED[word]
    shifted = [a.codes.astype(np.int16) + shift for a in coded]
    if all(a.min() >= 0 and a.max() < 1 << bits for a in shifted):
        return word, [a.codes for a in coded], [a.times for a in coded if a.times is not None]
    return "_".join(["FP32"] * len(coded)), [], [a.floats() for a in coded]


def _floats(w: ExactForm) -> tuple[Form, np.ndarray]:
    """Halves, or pairs of halves where one does not do.

    bfloat16's 8 significant bits fit a half; what is below the smallest halves is off by 3·10⁻⁸ at most.
    """
    floats = bf16_to_f32(w.codes) if w.form.decoding == "bf16" else w.codes
    small = w.form.decoding == "bf16" and np.abs(floats).max(initial=0) <= layout.LARGEST_HALF
    if w.form.decoding == "fp16" or small:
        halves = floats.astype(np.float16, copy=False)
        return Form(16), _banded(halves, lambda a: layout.pack_halves([a.view(np.uint16)]))
    return Form(32), _banded(floats, lambda a: layout.pack_halves(layout.split_floats(a)))


def _banded(a: np.ndarray, pack: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([pack(a[begin:end]) for begin, end in layout.bands(len(a))])
