"""Linears of `tinychat.network.weights` in the CUDA kernels' forms, and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from tinychat.backends import pack_file as packs
from tinychat.kernels_cuda import layout, linear
from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.layout import TILE, Form, Shape
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.modules import Modules
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear, Int8Linear, Linear, QuantizedLinear, bf16_to_f32

LAYOUT = "cuda1"  # of kernels_cuda/layout.py, in the name of a pack
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
        family: ModuleType,
        modules: Modules,
        tell: Callable[[str], None] | None = None,
    ):
        path = packs.pack_path(checkpoint, policy, LAYOUT, tell)
        self.pack = packs.opened(
            path,
            lambda sink: CudaPacker(checkpoint, policy, sink).pack(family),
            checkpoint,
            tell,
            at_once=True,
        )
        self.modules = modules
        self.sources: list[tuple[str, dict[str, str]]] = []  # that the weights need, and how compiled
        self._piece = Memory(0, 0)

    def vector(self, name: str) -> Memory:
        """float32 [n]."""
        v = self.pack.array(self.pack.index["vectors"][name], np.float32)
        memory = self._allocate(v.nbytes)
        self.modules.device.upload(memory, v)
        return memory

    def linear(self, *names: str) -> tuple[DeviceLinear, ...]:
        """Linears that share an input; neighbours that can be one weight are."""
        packed = _joined([self._read(n) for n in names])
        source = "experts.cu" if EXPERT in names[0] else "linear.cu"
        self.sources += [(source, shape.form.defines) for shape, _ in packed]
        return tuple(linear.upload(self.modules, *p, self._allocate) for p in packed)

    def router(self, name: str) -> tuple[DeviceLinear, ...]:
        """What chooses experts."""
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
        bits, meta, n, k, group = e["form"]
        parts = {
            part: None if e[part] is None else self.pack.array(e[part], kind) for part, kind in PARTS.items()
        }
        return Shape(Form(bits, meta), n, k, group), parts


class CudaPacker(packs.Packer):
    """For the CUDA kernels."""

    def entry(self, w: Linear) -> dict[str, Any]:
        shape, parts = pack(w)
        where = {part: self.put(parts[part]) for part in PARTS}
        form = [shape.form.bits, shape.form.meta, shape.n, shape.k, shape.group]
        return {**where, "form": form, "data": where["codes"]}


def pack(w: Linear) -> Packed:
    """The smallest form that holds the weight, and its arrays: codes, meta, zeros, bias, perm."""
    n, k = w.shape
    parts: dict[str, np.ndarray | None] = dict.fromkeys(("meta", "zeros", "perm"))
    parts["bias"] = None if w.bias is None else np.ascontiguousarray(w.bias, np.float32)
    if isinstance(w, QuantizedLinear) and w.group % layout.CHUNK == 0:
        form, scales, aux = _four_bits(w)
        parts["codes"] = _banded(w.codes, lambda a: layout.pack_codes(a, 4))
        parts["perm"] = None if w.perm is None else np.ascontiguousarray(w.perm, np.int32)
        if form.meta == "ZERO":
            parts["meta"], parts["zeros"] = layout.pack_meta(scales), layout.pack_zeros(aux)
        else:
            parts["meta"] = layout.pack_meta(scales, aux)
        return Shape(form, n, k, w.group), parts
    if isinstance(w, Int8Linear) and w.group % layout.CHUNK == 0:
        scales = exact_halves(w.scales)
        parts["codes"] = _banded(w.codes, lambda a: layout.pack_codes(a, 8))
        if scales is not None:
            parts["meta"] = layout.pack_meta(scales)
            return Shape(Form(8, "SYMMETRIC"), n, k, w.group), parts
        scales = w.scales.astype(np.float32)
        parts["meta"] = layout.pack_meta(scales, np.zeros_like(scales))
        return Shape(Form(8, "FLOAT"), n, k, w.group), parts
    halves = _as_halves(w)
    if halves is not None:
        parts["codes"] = _banded(halves, lambda a: layout.pack_halves([a.view(np.uint16)]))
        return Shape(Form(16), n, k, k), parts
    parts["codes"] = _banded(w.dequantize(), lambda a: layout.pack_halves(layout.split_floats(a)))
    return Shape(Form(32), n, k, k), parts


def _banded(a: np.ndarray, pack) -> np.ndarray:
    return np.concatenate([pack(a[begin:end]) for begin, end in layout.bands(len(a))])


def _four_bits(w: QuantizedLinear) -> tuple[Form, np.ndarray, np.ndarray | None]:
    scales = exact_halves(w.scales)
    if scales is not None and w.zeros is not None and w.zeros.max() <= 15:
        if (w.zeros == 8).all():
            return Form(4, "SYMMETRIC"), scales, None
        return Form(4, "ZERO"), scales, w.zeros.astype(np.uint8)
    offsets = None if w.offsets is None else exact_halves(w.offsets)
    if scales is not None and offsets is not None:
        return Form(4, "OFFSET"), scales, offsets
    scales = w.scales.astype(np.float32)
    if w.offsets is not None:
        return Form(4, "FLOAT"), scales, w.offsets.astype(np.float32)
    return Form(4, "FLOAT"), scales, -w.zeros.astype(np.float32) * scales


def exact_halves(a: np.ndarray) -> np.ndarray | None:
    """float16 of `a`, or None if that does not hold it exactly."""
    if a.dtype == np.float16:
        return a
    with np.errstate(over="ignore"):
        half = a.astype(np.float16)
    return half if (half.astype(a.dtype) == a).all() else None


def _as_halves(w: Linear) -> np.ndarray | None:
    """A 16-bit weight as float16. bfloat16's 8 significant bits fit; what is below the smallest halves is off
    by 3·10⁻⁸ at most.
    """
    if not isinstance(w, DenseLinear):
        return None
    if w.weight.dtype == np.float16:
        return w.weight
    if not w.bf16:
        return None
    values = bf16_to_f32(w.weight)
    return values.astype(np.float16) if np.abs(values).max(initial=0) <= layout.LARGEST_HALF else None
