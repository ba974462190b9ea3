"""MLX's layouts: codes in uint32 words along the inputs, lowest bits first.

For a linear of K inputs, N outputs, groups of g inputs and b bits:

    affine  weight uint32 [N, K·b/32]; scales and biases [N, K/g], 16 or 32 bits: w = q · scale + bias
    mxfp4   weight uint32 [N, K/8]; scales uint8 [N, K/32], powers of two
    mxfp8   weight uint32 [N, K/4], e4m3; scales uint8 [N, K/32], powers of two
    nvfp4   weight uint32 [N, K/8]; scales uint8 [N, K/16], e4m3; global_scale float32, optional

Source: mlx 0.32, `mlx.core.quantize`; mlx-lm 0.32, `utils.py`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import floats, nibbles
from tinychat.formats.scheme import Module, Stored
from tinychat.network.weight_form import Coded, Form
from tinychat.network.weights import QuantizedLinear


def affine(m: Module) -> Stored:
    """A module of integers with a scale and an offset for each group."""

    def shapes(bits: int, groups: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (m.n, nibbles.width(m.k, bits)), "scales": (m.n, groups)}

    grid, groups = m.pick(shapes)
    bits = grid.bits
    weight = m.part("weight", (m.n, m.whole(m.k, bits, "inputs")), "U32")
    scales, biases = m.numbers("scales", (m.n, groups)), m.numbers("biases", (m.n, groups))

    def read() -> QuantizedLinear:
        codes = np.ascontiguousarray(nibbles.unpack(weight.read(), bits))
        s, offsets = (np.ascontiguousarray(t.numbers()) for t in (scales, biases))
        return QuantizedLinear(codes, s, offsets=offsets, bits=bits)

    return Stored(Form(bits, "unsigned", m.group(groups), scales.kind, biases.kind), read)


def small_floats(m: Module) -> Stored:
    """A module in one of the modes without biases: codes and groups tell which."""
    n, k, columns = m.n, m.k, m.peek("scales").shape[-1:]
    if m.peek("weight").shape == (n, k // 4):
        return _mxfp8(m)
    weight = m.part("weight", (n, m.whole(k, 4, "inputs")), "U32")
    if columns == (k // floats.NV,) and k % floats.NV == 0:
        scales = m.part("scales", (n, k // floats.NV), "U8")
        whole = m.part("global_scale", m.peek("global_scale").shape, "F32") if m.has("global_scale") else None

        def read() -> QuantizedLinear:
            times = np.ones((1, 1), np.float32) if whole is None else whole.read().reshape(1, 1)
            return floats.unpack_nvfp4(weight.read(), scales.read(), times)

        return Stored(Form(4, "e2m1", m.group(k // floats.NV), "e4m3"), read)
    powers = m.part("scales", (n, k // floats.MX), "U8")
    form = Form(4, "e2m1", m.group(k // floats.MX), "e8m0")
    return Stored(form, lambda: floats.unpack_mxfp4(weight.read(), powers.read()))


def _mxfp8(m: Module) -> Stored:
    weight = m.part("weight", (m.n, m.whole(m.k, 8, "inputs")), "U32")
    powers = m.part("scales", (m.n, m.k // floats.MX), "U8")

    def read() -> QuantizedLinear:
        codes = floats.numbers(np.ascontiguousarray(nibbles.unpack(weight.read(), 8)))
        scales = floats.finite(Coded("e8m0", powers.read()))
        return QuantizedLinear(codes, scales, bits=8, table="e4m3")

    return Stored(Form(8, "e4m3", m.group(m.k // floats.MX), "e8m0"), read)
