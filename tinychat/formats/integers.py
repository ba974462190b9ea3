"""Integers of compressed-tensors, in words (`pack-quantized`) and in bytes (`int-quantized`,
`naive-quantized`), and those of LLM.int8.

For a linear of K inputs, N outputs, G groups and b bits:

    pack-quantized  weight_packed int32 [N, ⌈K·b/32⌉]; weight_scale [N, G]; weight_g_idx int32 [K], optional
                    weight_zero_point int32 [⌈N·b/32⌉, G], packed along N; all stored + 2^(b - 1)
    in bytes        weight int8 [N, K]; weight_scale [N, 1], [N, G] or one; weight_zero_point int8 like it
    LLM.int8        weight int8 [N, K]; SCB float32 [N]: w = q · SCB / 127

Weights of 8 bits for activations of 8 bits (W8A8) are stored in bytes: how finely activations are computed
does not change what the weight is.
Sources: compressed-tensors 0.20, `compressors/pack_quantized` and `naive_quantized`; bitsandbytes 0.50,
`nn/modules.py`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import gptq, nibbles
from tinychat.formats.scheme import Module, Stored, scales_of
from tinychat.network.weight_form import ROW, Form
from tinychat.network.weights import QuantizedLinear


def packed(m: Module) -> Stored:
    """A module of `pack-quantized`."""
    n, k = m.n, m.k

    def shapes(bits: int, groups: int) -> dict[str, tuple[int, ...]]:
        return {"weight_packed": (n, nibbles.width(k, bits)), "weight_scale": (n, groups)}

    grid, groups = m.pick(shapes)
    bits = grid.bits
    weight = m.part("weight_packed", (n, nibbles.width(k, bits)), "I32")
    scales = m.numbers("weight_scale", (n, groups))
    stored = m.part("weight_shape", (2,), "I64", "I32")
    g_idx = m.part("weight_g_idx", (k,), "I32") if m.has("weight_g_idx") else None
    zeros = None
    if m.said.needs_zeros(bits) or m.has("weight_zero_point"):
        zeros = m.part("weight_zero_point", (nibbles.width(n, bits), groups), "I32")

    def read() -> QuantizedLinear:
        if (shape := stored.read().tolist()) != [n, k]:
            raise ValueError(f"weight_shape says {shape}, config.json {[n, k]}")
        idx = None if g_idx is None else g_idx.read()
        z = None if zeros is None else zeros.read()
        return gptq.unpack_compressed(weight.read(), scales.numbers(), z, idx, bits=bits, k=k)

    plain, offset = ("signed", "none") if zeros is None else ("unsigned", "zero")
    return Stored(Form(bits, plain, m.group(groups), scales.kind, offset), read)


def in_bytes(m: Module) -> Stored:
    """A module of int8 with the scales of compressed-tensors."""
    weight = m.part("weight", (m.n, m.k), "I8")
    scales = scales_of(m, "weight_scale")
    zeros = None
    if m.said.needs_zeros(8) or m.has("weight_zero_point"):
        zeros = m.part("weight_zero_point", scales.tensor.shape, "I8")

    def read() -> QuantizedLinear:
        codes, s = weight.read(), scales.read()
        if zeros is None:
            return QuantizedLinear(np.ascontiguousarray(codes), s, bits=8, rows=scales.rows)
        z = np.ascontiguousarray(scales.spread(zeros.read()))
        unsigned = [(a.view(np.uint8) ^ np.uint8(0x80)) for a in (codes, z)]
        return QuantizedLinear(unsigned[0], s, unsigned[1], bits=8, rows=scales.rows)

    plain, offset = ("signed", "none") if zeros is None else ("unsigned", "zero")
    return Stored(scales.form(m, 8, plain, offset), read)


def llm_int8(m: Module) -> Stored:
    """A module of bitsandbytes in 8 bits; it has the weights of outlying inputs too."""
    weight = m.part("weight", (m.n, m.k), "I8")
    largest = m.part("SCB", (m.n,), "F32")
    order = m.part("weight_format", (), "U8") if m.has("weight_format") else None

    def read() -> QuantizedLinear:
        if order is not None and int(order.read()) != 0:
            raise ValueError(f"weight_format is {int(order.read())}, and only rows (0) are read")
        scales = largest.numbers() * np.float32(1 / 127)
        return QuantizedLinear(np.ascontiguousarray(weight.read()), scales[:, None], bits=8)

    return Stored(Form(8, "signed", ROW, "fp32"), read)
