"""Weights in the CUDA kernels' layout, and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from tinychat.backends import pack_store
from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.pack_store import Put
from tinychat.kernels_cuda import layout, linear
from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.layout import TILE, Form, Shape
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.modules import Modules
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.family import Family
from tinychat.network.weight_form import TABLES, Coded
from tinychat.network.weight_policy import WeightPolicy
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


def _joined(packed: list[Packed]) -> list[Packed]:
    """Weights of one form below each other, where the upper one ends with a whole tile."""
    out: list[Packed] = []
    for shape, parts in packed:
        if out and parts["perm"] is None:
            above, over = out[-1]
            alike = (above.form, above.k, above.group) == (shape.form, shape.k, shape.group)
            if alike and above.n % TILE == 0 and over["perm"] is None:
                out[-1] = replace(above, n=above.n + shape.n), _below(above, over, shape, parts)
                continue
        out.append((shape, parts))
    return out


def _below(above: Shape, over: dict, shape: Shape, parts: dict) -> dict[str, np.ndarray | None]:
    both: dict[str, np.ndarray | None] = {"perm": None, "bias": None}
    for name in ("codes", "meta", "zeros"):
        both[name] = None if parts[name] is None else np.concatenate([over[name], parts[name]])
    if over["bias"] is not None or parts["bias"] is not None:
        pairs = ((above, over), (shape, parts))
        both["bias"] = np.concatenate(
            [np.zeros(s.n, np.float32) if p["bias"] is None else p["bias"] for s, p in pairs]
        )
    return both


class Loader:
    """Gives a model file its weights on the device, out of a pack: one module at a time, straight from the
    mapped file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy,
        family: Family,
        modules: Modules,
        tell: Callable[[str], None] | None = None,
    ):
        self.pack = pack_store.opened(checkpoint, policy, family, CudaLayout(), tell, at_once=True)
        self.modules = modules
        self.sources: list[tuple[str, dict[str, str]]] = []  # that the weights need, and how compiled
        self._piece = Memory(0, 0)

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
        return tuple(linear.upload(self.modules, *p, self._allocate) for p in packed)

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

    def _allocate(self, size: int) -> Memory:
        """Device memory. Small weights share pieces: the driver rounds each allocation up to its pages."""
        if size > PIECE // 8:
            return self.modules.device.allocate(size)
        if self._piece.size < size:
            self._piece = self.modules.device.allocate(PIECE)
        memory = self._piece[:size]
        self._piece = self._piece[-(-size // ALIGNED) * ALIGNED :]
        return memory

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
