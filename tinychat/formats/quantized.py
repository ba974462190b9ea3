"""The schemes that a folder's quantized modules may be stored in; a module is read in the one that its
tensors show.

Folders in the wild mislabel their version and mix schemes, so names, dtypes and shapes of tensors decide.
"""

from __future__ import annotations

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats import awq, floats, gemv, gptq, integers, mlx, nf4
from tinychat.formats.quantization import SUPPORTED
from tinychat.formats.scheme import Module, Quantization, Scheme, Stored
from tinychat.formats.tensors import PULL_AGAIN, Tensor, Tensors
from tinychat.network.weights import QuantizedLinear

_NF4 = ("weight_absmax", "weight_quant_map", nf4.STATE)
_NESTED = ("weight_nested_absmax", "weight_nested_quant_map")
SCHEMES = (
    Scheme("gemv_fast", "qweight", ("I16",), ("scales",), gemv.look_fast, ("qzeros", "scaled_zeros")),
    Scheme("awq", "qweight", ("I32",), ("scales",), awq.look, ("qzeros",)),
    Scheme("gptq", "qweight", ("I32",), ("scales", "qzeros"), gptq.look, ("g_idx",)),
    Scheme(
        "pack-quantized", "weight_packed", ("I32",), ("weight_scale", "weight_shape"), integers.packed,
        ("weight_zero_point", "weight_g_idx"),
    ),
    Scheme("nvfp4", "weight_packed", ("U8",), ("weight_scale", "weight_global_scale"), floats.nvfp4),
    Scheme("mxfp4", "weight_packed", ("U8",), ("weight_scale",), floats.mxfp4),
    Scheme("modelopt nvfp4", "weight", ("U8",), ("weight_scale", "weight_scale_2"), floats.nvfp4),
    Scheme("mxfp4 blocks", "blocks", ("U8",), ("scales",), floats.mxfp4_blocks),
    Scheme("fp8", "weight", ("F8_E4M3",), ("weight_scale_inv",), floats.fp8),
    Scheme("fp8", "weight", ("F8_E4M3",), ("weight_scale",), floats.fp8, ("weight_zero_point",)),
    Scheme("int8", "weight", ("I8",), ("weight_scale",), integers.in_bytes, ("weight_zero_point",)),
    Scheme("llm.int8", "weight", ("I8",), ("SCB",), integers.llm_int8, ("weight_format",)),
    Scheme("nf4", "weight", ("U8",), _NF4, nf4.look, _NESTED),
    Scheme("mlx affine", "weight", ("U32",), ("scales", "biases"), mlx.affine),
    Scheme("mlx floats", "weight", ("U32",), ("scales",), mlx.small_floats, ("global_scale",)),
)  # fmt: skip
# Scales of activations and of a KV cache, found while calibrating. Activations get their own scale here, row
# by row, and the weights do not depend on them.
ACTIVATIONS = frozenset(
    {"input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale"}
    | {"output_scale", "output_zero_point", "act_scale", "k_scale", "v_scale", "q_scale", "kv_scale"}
)


def is_quantized(parts: dict[str, Tensor]) -> bool:
    """Whether a module with these tensors is stored in codes."""
    return bool(_alike(parts))


def _alike(parts: dict[str, Tensor]) -> list[Scheme]:
    """The schemes whose codes are there."""
    return [s for s in SCHEMES if (t := parts.get(s.codes)) is not None and t.dtype in s.dtypes]


def _fitting(q: Quantization | None, parts: dict[str, Tensor]) -> list[Scheme]:
    """Those of them that the settings allow; all where they are silent."""
    return [s for s in _alike(parts) if q is None or s.name in q.schemes]


def check_parts(q: Quantization | None, name: str, parts: dict[str, Tensor]) -> None:
    """Refuse a module with a tensor that nobody here understands, by name."""
    fitting = _fitting(q, parts)
    whole = [s for s in fitting if all(p in parts for p in s.needs)][:1]
    known = {"weight", "bias"}
    for s in whole or fitting:
        known |= {s.codes, *s.needs, *s.also}
    unknown = sorted(parts.keys() - known - ACTIVATIONS)
    if unknown:
        raise UnsupportedModelError(
            f"The module {name} has a tensor {unknown[0]}, which is not understood.",
            "The model is quantized in a way that is not supported; choose another one of its versions.",
        )


def look(tensors: Tensors, q: Quantization | None, name: str, shape: tuple[int, ...] | None) -> Stored:
    """The quantized module `name` of `shape` [out, in], its tensors checked by their headers.

    Raises UnsupportedModelError or CheckpointError by the name of the module or its tensor.
    """
    if q is None:
        held = ", ".join(sorted({s.dtypes[0] for s in _alike(tensors.parts(name))}))
        raise UnsupportedModelError(
            f"{name} is quantized ({held}), but config.json has no quantization_config that says how.",
            SUPPORTED,
        )
    if shape is None or len(shape) != 2:
        raise UnsupportedModelError(
            f"{name} is quantized, which is supported in the model's linears only.",
            "Quantize the checkpoint again with this module in 16 bits.",
        )
    scheme = _scheme(q, name, tensors.parts(name))
    try:
        return scheme.look(Module(tensors, q, name, *shape))
    except ValueError as e:
        raise _unreadable(name, e) from e


def read_linear(
    tensors: Tensors,
    q: Quantization | None,
    name: str,
    shape: tuple[int, ...] | None,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """The quantized module `name` of `shape` [out, in], bit for bit; raises what `look` raises."""
    stored = look(tensors, q, name, shape)
    try:
        w = stored.read()
    except ValueError as e:
        raise _unreadable(name, e) from e
    return QuantizedLinear(w.codes, w.scales, w.zeros, w.offsets, bias, w.perm, w.bits, w.table, w.rows)


def _unreadable(name: str, e: ValueError) -> CheckpointError:
    return CheckpointError(f"{name} cannot be unpacked: {e}.", PULL_AGAIN)


def _scheme(q: Quantization, name: str, parts: dict[str, Tensor]) -> Scheme:
    """The scheme of a module: of those that the settings allow the first whose tensors are there."""
    fitting = _fitting(q, parts)
    for s in fitting:
        if all(p in parts for p in s.needs):
            return s
    if fitting:
        missing = next(p for p in fitting[0].needs if p not in parts)
        raise CheckpointError(f"{name} has no tensor {name}.{missing}.", PULL_AGAIN)
    held = ", ".join(f"{p} {t.dtype}" for p, t in sorted(parts.items()))
    raise UnsupportedModelError(
        f"{name} is stored as {held}, which is not {' or '.join(q.schemes)}.",
        "config.json and the weights do not belong together; pull or convert the model again.",
    )
