"""AutoAWQ's `gemm` layout: codes packed along the outputs, 4-bit ones eight to an int32 word.

For a linear of K inputs, N outputs, groups of g inputs (G = K / g) and b bits:

    qweight  int32 [K, N·b/32]  place i of a run of eight (lowest first) holds output 8c + ORDER[i]
    qzeros   int32 [G, N·b/32]  packed the same way; the zero points as they are
    scales   float16 [G, N]

so that `w[n, k] = (q[n, k] - zero[n, k // g]) * scale[n, k // g]`. AutoAWQ knows 4 bits alone. With other
widths auto-round keeps the order within eight, and gptqmodel lets the outputs follow each other.
Sources: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py`; auto-round 0.16, `export_to_awq`; gptqmodel 7.7,
`quantization/awq/utils/packing_utils.py`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import gemv, nibbles
from tinychat.formats.scheme import Module, Stored
from tinychat.network.weight_form import Form, exact_halves
from tinychat.network.weights import QuantizedLinear

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def look(m: Module) -> Stored:
    """A module of AWQ in int32 words: `gemm`, or `gemv` where its tensors lie along the inputs."""
    n, k = m.n, m.k

    def shapes(bits: int, groups: int) -> dict[str, tuple[int, ...]]:
        return {"qweight": (k, nibbles.width(n, bits)), "scales": (groups, n)}

    grid, groups = m.pick(shapes)
    bits = grid.bits
    # a square weight looks the same packed along either side; its scales do not
    if bits == 4 and m.peek("qweight").shape == (n, k // 8) and m.peek("scales").shape[:1] == (n,):
        return gemv.look(m, groups)
    width = m.whole(n, bits, "outputs")
    weight = m.part("qweight", (k, width), "I32")
    scales = m.numbers("scales", (groups, n))
    symmetric = not m.said.needs_zeros(bits) and not m.has("qzeros")
    zeros = None if symmetric else m.part("qzeros", (groups, width), "I32")

    def read() -> QuantizedLinear:
        z = None if zeros is None else zeros.read()
        return unpack(weight.read(), z, scales.numbers(), bits=bits, order=m.said.order)

    return Stored(Form(bits, "unsigned", m.group(groups), scales.kind, "zero"), read)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, N], values 0…15, to int32 [rows, N/8] words. ValueError if 8 does not divide N."""
    rows, n = values.shape
    if n % 8:
        raise ValueError(f"{n} outputs are not a multiple of 8, which AutoAWQ's packing needs")
    lanes = values.reshape(rows, n // 8, 8)
    packed = np.empty((rows, n // 8, 4), np.uint8)
    for byte in range(4):
        np.left_shift(lanes[:, :, ORDER[2 * byte + 1]], 4, out=packed[:, :, byte])
        packed[:, :, byte] |= lanes[:, :, ORDER[2 * byte]]
    return packed.reshape(rows, n // 2).view("<i4").astype(np.int32, copy=False)


def pack(weight: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors `qweight`, `qzeros`, `scales` (and `bias`) of a weight, bit for bit.

    Raises ValueError for what the layout cannot hold: offsets, a permutation, zeros above 15, float32 scales
    that float16 does not represent, outputs that are not a multiple of 8.
    """
    if weight.bits != 4 or weight.zeros is None or weight.perm is not None:
        raise ValueError("AutoAWQ's gemm layout holds 4 bits, integer zero points and no permutation")
    if weight.zeros.size and weight.zeros.max() > 15:
        raise ValueError("AutoAWQ's gemm layout holds zero points up to 15")
    scales = exact_halves(weight.scales)
    if scales is None:
        raise ValueError("the scales are not exact in float16")
    out = {
        "qweight": pack_nibbles(np.ascontiguousarray(weight.codes.T)),
        "qzeros": pack_nibbles(np.ascontiguousarray(weight.zeros.T)),
        "scales": np.ascontiguousarray(scales.T),
    }
    if weight.bias is not None:
        out["bias"] = weight.bias.astype(np.float16)
    return out


def unpack(
    qweight: np.ndarray,
    qzeros: np.ndarray | None,
    scales: np.ndarray,
    bias: np.ndarray | None = None,
    bits: int = 4,
    order: bool = True,
) -> QuantizedLinear:
    """The weight that the tensors hold, bit for bit. `qzeros` None: symmetric, zero 2^(bits - 1).

    order  whether the outputs of each eight are interleaved
    Raises ValueError when the shapes do not belong together.
    """
    k, n = qweight.shape[0], qweight.shape[1] * 32 // bits
    groups = scales.shape[0]
    if scales.shape != (groups, n) or groups == 0 or k % groups:
        raise ValueError(f"scales {scales.shape} do not fit qweight {qweight.shape}")
    if qzeros is not None and qzeros.shape != (groups, qweight.shape[1]):
        raise ValueError(f"qzeros {qzeros.shape} do not fit scales {scales.shape}")
    middle = np.full((n, groups), 1 << (bits - 1), np.uint8)
    return QuantizedLinear(
        codes=unpack_words(qweight, bits, order),
        scales=np.ascontiguousarray(scales.T),
        zeros=middle if qzeros is None else unpack_words(qzeros, bits, order),
        bias=None if bias is None else bias.astype(np.float32),
        bits=bits,
    )


def unpack_words(packed: np.ndarray, bits: int = 4, order: bool = True) -> np.ndarray:
    """int32 [rows, N·bits/32] to uint8 [N, rows]. order: as for `unpack`."""
    if bits == 4 and order:
        # words are turned before they are opened: an eighth of the bytes, and codes are written in rows
        turned = np.ascontiguousarray(packed.T).astype("<i4", copy=False)
        lanes = turned.view(np.uint8).reshape(*turned.shape, 4)
        out = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
        for byte in range(4):
            np.bitwise_and(lanes[:, :, byte], 15, out=out[:, ORDER[2 * byte]])
            np.right_shift(lanes[:, :, byte], 4, out=out[:, ORDER[2 * byte + 1]])
        return out.reshape(-1, turned.shape[1])
    codes = nibbles.unpack(packed, bits)
    if order:
        codes = codes.reshape(len(codes), -1, 8)[:, :, np.argsort(ORDER)].reshape(len(codes), -1)
    return np.ascontiguousarray(codes.T)
