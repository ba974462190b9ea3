"""Reader of `quantization_config` and of the 4-bit modules of a folder in the layout that their tensors have.

Folders in the wild mislabel their version, so the tensors' names, dtypes and shapes decide the layout; the
config decides the method and the group size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats import awq, gemv, gptq
from tinychat.formats.tensors import FLOATS, LLM_AWQ, PULL_AGAIN, Tensors, llm_awq_file, read_json
from tinychat.network.weight_form import ROW, Form
from tinychat.network.weights import QuantizedLinear

# what a module's codes cannot be read without, in any layout
COMPANIONS = {"qweight": ("scales",), "weight_packed": ("weight_scale", "weight_shape")}
PARTS = ("qweight", "weight_packed")  # a module that has one of these is quantized
SUPPORTED = (
    "Supported with 4 bits: AWQ (gemm, gemv, gemv_fast, llm-awq), GPTQ, compressed-tensors pack-quantized; "
    "and unquantized weights."
)


@dataclass(frozen=True)
class Quantization:
    """method awq | gptq | compressed-tensors. group_size −1: the whole row.

    zero_point  awq: zeros are stored; compressed-tensors: not symmetric
    version     gptq: 1 stores zero − 1, 2 stores zero
    file        the name of the file with the weights, where the settings say it
    """

    method: str
    group_size: int
    zero_point: bool = True
    version: int = 1
    file: str | None = None


def read_quantization(folder: Path, config: dict[str, Any]) -> Quantization | None:
    """How the folder's quantized modules are stored; None when nothing says that any is.

    Raises UnsupportedModelError for another method, layout, width or option, by name.
    """
    q = config.get("quantization_config")
    if q is None and (old := read_json(folder / "quant_config.json")) is not None:  # AutoAWQ before 0.1.6
        q = {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size")}
        q |= {key: old[key] for key in ("version", "zero_point") if key in old}
    if q is None and (old := read_json(folder / "quantize_config.json")) is not None:  # AutoGPTQ before 0.7
        return _auto_gptq(old)
    if q is None:
        file = llm_awq_file(folder)
        said = file and LLM_AWQ.search(file.name)
        return Quantization("awq", int(said[1])) if said else None
    if not isinstance(q, dict):
        raise CheckpointError(f"quantization_config is {q!r}, not an object.", PULL_AGAIN)
    method = str(q.get("quant_method", "(none)")).lower()
    if method not in _METHODS:
        raise UnsupportedModelError(f"The quantization method {method!r} is not supported.", SUPPORTED)
    return _METHODS[method](q)


def _awq(q: dict[str, Any]) -> Quantization:
    version = str(q.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        raise UnsupportedModelError(f"The AWQ layout {version!r} is not supported.", SUPPORTED)
    _four_bits("AWQ", q.get("bits", q.get("w_bit", 4)))
    group = _group(q.get("group_size", q.get("q_group_size", 128)))
    return Quantization("awq", group, bool(q.get("zero_point", True)))


def _gptq(q: dict[str, Any]) -> Quantization:
    _four_bits("GPTQ", q.get("bits"))
    layout = str(q.get("checkpoint_format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"The GPTQ layout {layout!r} is not supported.", SUPPORTED)
    rules = q.get("dynamic") or {}
    if not isinstance(rules, dict) or any(not str(rule).startswith("-:") for rule in rules):
        raise UnsupportedModelError("GPTQ with dynamic bits or groups is not supported.", SUPPORTED)
    return Quantization("gptq", _group(q.get("group_size", 128)), version=2 if layout == "gptq_v2" else 1)


def _auto_gptq(old: dict[str, Any]) -> Quantization:
    """AutoGPTQ's own file. It is silent about the method where the method is GPTQ, and names the weights'
    file without its ending.
    """
    if old.get("is_marlin_format"):
        raise UnsupportedModelError("The GPTQ layout 'marlin' is not supported.", SUPPORTED)
    method = str(old.get("quant_method") or "gptq").lower()
    if method not in ("gptq", "awq"):
        raise UnsupportedModelError(f"The quantization method {method!r} is not supported.", SUPPORTED)
    name = old.get("model_file_base_name")
    return replace(_METHODS[method](old), file=f"{name}.safetensors" if name else None)


def _compressed(q: dict[str, Any]) -> Quantization:
    layout = q.get("format")
    if layout != "pack-quantized":
        raise UnsupportedModelError(f"The compressed-tensors format {layout!r} is not supported.", SUPPORTED)
    if q.get("quantization_status", "compressed") != "compressed":
        raise UnsupportedModelError(
            f"compressed-tensors with the status {q['quantization_status']!r} are not supported.", SUPPORTED
        )
    for option in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if q.get(option):
            raise UnsupportedModelError(f"compressed-tensors with a {option} are not supported.", SUPPORTED)
    groups = q.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in schemes):
        raise CheckpointError("quantization_config has no config_groups with weights.", PULL_AGAIN)
    found = set()
    for s in schemes:
        for option in ("input_activations", "output_activations"):
            if s.get(option):
                raise UnsupportedModelError(
                    f"compressed-tensors with quantized {option} are not supported.", SUPPORTED
                )
        w = s["weights"]
        _four_bits("compressed-tensors", w.get("num_bits"))
        if w.get("type", "int") != "int":
            raise UnsupportedModelError(
                f"compressed-tensors of type {w['type']!r} are not supported.", SUPPORTED
            )
        strategy = w.get("strategy")
        if strategy not in ("group", "channel"):
            raise UnsupportedModelError(
                f"The compressed-tensors strategy {strategy!r} is not supported.", SUPPORTED
            )
        group = _group(w.get("group_size")) if strategy == "group" else -1
        found.add((group, not w.get("symmetric", True)))
    if len(found) > 1:
        raise UnsupportedModelError("compressed-tensors with several schemes are not supported.", SUPPORTED)
    return Quantization("compressed-tensors", *found.pop())


_METHODS: dict[str, Callable[[dict[str, Any]], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}


def _four_bits(what: str, bits: Any) -> None:
    if bits != 4:
        raise UnsupportedModelError(f"{what} with {bits!r} bits is not supported.", SUPPORTED)


def _group(group: Any) -> int:
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or 1 <= group <= 1 << 20):
        raise CheckpointError(f"The quantization group size {group!r} makes no sense.", PULL_AGAIN)
    return group


def quantized_form(tensors: Tensors, q: Quantization, name: str, k: int) -> Form:
    """The form of the quantized module `name` of k inputs, by its settings and the names of its tensors."""
    parts = [part for part in ("qzeros", "scaled_zeros", "weight_zero_point") if f"{name}.{part}" in tensors]
    scales = next(s for s in ("scales", "weight_scale") if f"{name}.{s}" in tensors)
    scale = "fp16" if tensors[f"{name}.{scales}"].dtype == "F16" else "fp32"
    group = ROW if q.group_size in (-1, k) else q.group_size
    return Form(4, "unsigned", group, scale, "zero") if parts else Form(4, "signed", group, scale)


def read_linear(
    tensors: Tensors, q: Quantization, name: str, shape: tuple[int, int], bias: np.ndarray | None
) -> QuantizedLinear:
    """The quantized module `name` of `shape` [out, in], bit for bit."""
    n, k = shape
    group = k if q.group_size == -1 else q.group_size
    if k % group or k % 8:
        raise UnsupportedModelError(
            f"{name} is {n} × {k}, which group size {group} (and 8 codes a word) does not divide.",
            "Quantize the model again with a group size that divides it (128, 64 or 32).",
        )
    read = _Module(tensors, q, name, n, k, group, bias)
    try:
        if q.method == "compressed-tensors":
            return read.compressed()
        if q.method == "gptq":
            return read.gptq()
        weight = tensors[f"{name}.qweight"]
        if weight.dtype == "I16":
            return read.gemv_fast()
        scales = tensors[f"{name}.scales"].shape
        # a square weight looks the same packed along either side; its scales do not
        if weight.shape == (n, k // 8) and scales[:1] == (n,):
            return read.gemv()
        return read.gemm()
    except ValueError as e:
        raise CheckpointError(f"{name} cannot be unpacked: {e}.", PULL_AGAIN) from e


@dataclass(frozen=True)
class _Module:
    """One quantized module: its tensors, each checked before it is read."""

    tensors: Tensors
    q: Quantization
    name: str
    n: int
    k: int
    group: int
    bias: np.ndarray | None

    def gemm(self) -> QuantizedLinear:
        n, k, groups = self.n, self.k, self.k // self.group
        self._outputs_by_8()
        weight = self._part("qweight", (k, n // 8), "I32")
        scales = self._part("scales", (groups, n), *FLOATS)
        symmetric = not self.q.zero_point and f"{self.name}.qzeros" not in self.tensors
        zeros = None if symmetric else self._part("qzeros", (groups, n // 8), "I32")
        return awq.unpack(weight, zeros, scales, self.bias)

    def gemv(self) -> QuantizedLinear:
        n, width = self.n, gemv.zeros_width(self.k, self.group)
        weight = self._part("qweight", (n, self.k // 8), "I32")
        scales = self._part("scales", (n, 8 * width), *FLOATS)
        zeros = self._part("qzeros", (n, width), "I32")
        return gemv.unpack(weight, zeros, scales, self.group, self.bias)

    def gemv_fast(self) -> QuantizedLinear:
        n, k, width = self.n, self.k, gemv.zeros_width(self.k, self.group)
        if n % gemv.ROWS or k % gemv.INPUTS:
            raise ValueError(f"{n} × {k} is not in blocks of {gemv.ROWS} × {gemv.INPUTS}")
        zeros = "scaled_zeros" if f"{self.name}.scaled_zeros" in self.tensors else "qzeros"
        weight = self._part("qweight", (n // gemv.ROWS, k), "I16")
        scales = self._part("scales", (8 * width, n), *FLOATS)
        return gemv.unpack_fast(
            weight, self._part(zeros, (8 * width, n), *FLOATS), scales, self.group, self.bias
        )

    def gptq(self) -> QuantizedLinear:
        n, k, groups = self.n, self.k, self.k // self.group
        self._outputs_by_8()
        weight = self._part("qweight", (k // 8, n), "I32")
        zeros = self._part("qzeros", (groups, n // 8), "I32")
        scales = self._part("scales", (groups, n), *FLOATS)
        return gptq.unpack(weight, zeros, scales, self._g_idx("g_idx"), self.q.version, self.bias)

    def compressed(self) -> QuantizedLinear:
        n, k, groups = self.n, self.k, self.k // self.group
        packed = self._part("weight_packed", (n, k // 8), "I32")
        scales = self._part("weight_scale", (n, groups), *FLOATS)
        stored = self._part("weight_shape", (2,), "I64", "I32").tolist()
        if stored != [n, k]:
            raise ValueError(f"weight_shape says {stored}, config.json {[n, k]}")
        zeros = None
        if self.q.zero_point or f"{self.name}.weight_zero_point" in self.tensors:
            zeros = self._part("weight_zero_point", (-(-n // 8), groups), "I32")
        return gptq.unpack_compressed(packed, scales, zeros, self._g_idx("weight_g_idx"), self.bias)

    def _part(self, part: str, shape: tuple[int, ...], *dtypes: str) -> np.ndarray:
        name = f"{self.name}.{part}"
        self.tensors.check(name, shape, dtypes)
        return self.tensors.scales(name) if dtypes == FLOATS else self.tensors.array(name)

    def _g_idx(self, part: str) -> np.ndarray | None:
        return self._part(part, (self.k,), "I32") if f"{self.name}.{part}" in self.tensors else None

    def _outputs_by_8(self) -> None:
        if self.n % 8:
            raise ValueError(f"{self.n} outputs are not whole words of 8")
