"""Codes that are small floats: FP8 (e4m3), MXFP4 and NVFP4 (e2m1), as several libraries store them.

For a linear of K inputs and N outputs; e2m1 lies two to a byte, the earlier input in the lower half:

    fp8     weight F8_E4M3 [N, K]; weight_scale_inv (DeepSeek, Qwen3) or weight_scale (compressed-tensors,
            modelopt, fbgemm): one, [N, 1], or a block's [⌈N/128⌉, ⌈K/128⌉]. Either multiplies
    mxfp8   the same with a power of two for each 32 inputs, uint8 [N, K/32]
    mxfp4   weight_packed uint8 [N, K/2]; weight_scale uint8 [N, K/32], powers of two (compressed-tensors)
            blocks uint8 [N, K/32, 16]; scales uint8 [N, K/32] (gpt-oss, one expert)
    nvfp4   weight uint8 [N, K/2]; weight_scale F8_E4M3 [N, K/16]; weight_scale_2 float32: times (modelopt)
            weight_packed, weight_scale likewise; weight_global_scale float32 divides (compressed-tensors)

Sources: transformers 5.23, `integrations/finegrained_fp8.py` and `mxfp4.py`; compressed-tensors 0.20,
`compressors/`; nvidia-modelopt 0.47, `quantization/qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinychat.formats import nibbles
from tinychat.formats.scheme import Module, Stored, scales_of
from tinychat.network.weight_form import Coded, Form, Numbers, is_no_e4m3
from tinychat.network.weights import QuantizedLinear

MX, NV = 32, 16  # inputs that share a scale
LARGEST_POWER = 245  # of e8m0: the largest e4m3, 448, times the next ones is infinite in float32


def fp8(m: Module) -> Stored:
    """A module of e4m3 with scales of any of the shapes."""
    weight = m.part("weight", (m.n, m.k), "F8_E4M3")
    scales = scales_of(m, "weight_scale_inv" if m.has("weight_scale_inv") else "weight_scale", powers=True)

    def read() -> QuantizedLinear:
        codes = numbers(np.ascontiguousarray(weight.read()))
        if m.has("weight_zero_point") and m.peek("weight_zero_point").read().any():
            raise ValueError("floats have a zero point other than 0")
        return QuantizedLinear(codes, finite(scales.read()), bits=8, table="e4m3", rows=scales.rows)

    return Stored(scales.form(m, 8, "e4m3"), read)


def numbers(codes: np.ndarray) -> np.ndarray:
    """The codes of e4m3; ValueError where one is no number."""
    if is_no_e4m3(codes).any():
        raise ValueError("a code of e4m3 is no number")
    return codes


def finite(scales: Numbers) -> Numbers:
    """Scales of e4m3; ValueError for a power of two that makes the largest code infinite."""
    if isinstance(scales, Coded) and scales.codes.max(initial=0) > LARGEST_POWER:
        raise ValueError("a scale is too large, or no number")
    return scales


def mxfp4(m: Module) -> Stored:
    """A module of compressed-tensors in MXFP4."""
    weight = m.part("weight_packed", (m.n, m.k // 2), "U8")
    scales = m.part("weight_scale", (m.n, m.k // MX), "U8")
    return _mxfp4(m, lambda: unpack_mxfp4(weight.read(), scales.read()))


def mxfp4_blocks(m: Module) -> Stored:
    """An expert of gpt-oss."""
    blocks = m.part("blocks", (m.n, m.k // MX, MX // 2), "U8")
    scales = m.part("scales", (m.n, m.k // MX), "U8")
    return _mxfp4(m, lambda: unpack_mxfp4(blocks.read().reshape(m.n, -1), scales.read()))


def _mxfp4(m: Module, read: Callable[[], QuantizedLinear]) -> Stored:
    _divides(m, MX)
    return Stored(Form(4, "e2m1", m.group(m.k // MX), "e8m0"), read)


def unpack_mxfp4(packed: np.ndarray, powers: np.ndarray) -> QuantizedLinear:
    """The weight of bytes [N, K/2] and powers of two uint8 [N, K/32], bit for bit."""
    scales = Coded("e8m0", np.ascontiguousarray(powers))
    return QuantizedLinear(np.ascontiguousarray(nibbles.unpack(packed, 4)), scales, table="e2m1")


def nvfp4(m: Module) -> Stored:
    """A module of modelopt or of compressed-tensors in NVFP4."""
    ours = m.has("weight_packed")
    weight = m.part("weight_packed" if ours else "weight", (m.n, m.k // 2), "U8")
    scales = m.part("weight_scale", (m.n, m.k // NV), "F8_E4M3")
    name = "weight_global_scale" if ours else "weight_scale_2"
    whole = m.part(name, () if m.peek(name).shape == () else (1,), "F32")
    _divides(m, NV)

    def read() -> QuantizedLinear:
        times = whole.numbers().reshape(1, 1)
        if ours:
            if not (times > 0).all():
                raise ValueError(f"the weight's global scale is {times.item()}")
            # The quotient that the library takes of each scale may differ in the last bit of fp32.
            times = np.float32(1) / times
        return unpack_nvfp4(weight.read(), scales.read(), times)

    return Stored(Form(4, "e2m1", m.group(m.k // NV), "e4m3"), read)


def unpack_nvfp4(packed: np.ndarray, scales: np.ndarray, times: np.ndarray) -> QuantizedLinear:
    """The weight of bytes [N, K/2], e4m3 codes [N, K/16] and one float32 [1, 1], bit for bit."""
    beside = Coded("e4m3", np.ascontiguousarray(scales), times)
    return QuantizedLinear(np.ascontiguousarray(nibbles.unpack(packed, 4)), beside, table="e2m1")


def _divides(m: Module, group: int) -> None:
    if m.k % group:
        raise ValueError(f"{m.k} inputs are no multiple of {group}")
