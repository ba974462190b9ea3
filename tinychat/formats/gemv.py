"""AWQ layouts packed along the inputs: AutoAWQ's `gemv` and `gemv_fast`, llm-awq's v1 and v2.

For a linear of K inputs, N outputs, groups of g inputs (G = K / g) and W = `zeros_width(K, g)`:

    gemv, llm-awq v1       qweight int32 [N, K/8]   scales float16 [N, 8W]   qzeros int32 [N, W]
    gemv_fast, llm-awq v2  qweight int16 [N/4, K]   scales float16 [8W, N]   qzeros float16 [8W, N]

The float16 qzeros hold -scale·zero; llm-awq calls them scaled_zeros.

Scales and zeros beyond G are padding.
Sources: AutoAWQ 0.2.9, `awq/modules/linear/gemv.py` and `gemv_fast.py`; llm-awq, `awq/quantize/qmodule.py`.
"""

from __future__ import annotations

import numpy as np

from tinychat.formats import nibbles
from tinychat.formats.scheme import Module, Stored
from tinychat.formats.tensors import FLOATS
from tinychat.network.weight_form import Form
from tinychat.network.weights import QuantizedLinear

ROWS, INPUTS = 4, 64  # gemv_fast interleaves blocks of 4 outputs × 64 inputs


def zeros_width(k: int, group: int) -> int:
    """Words that one output's zero points take, padding included."""
    words = -(-(k // group) // 8)
    multiple = 1 if group >= 128 else 2 if group >= 64 else 4
    return -(-words // multiple) * multiple


def look(m: Module, groups: int) -> Stored:
    """A module of `gemv` whose codes and scales lie along the inputs."""
    group, outputs = m.k // groups, zeros_width(m.k, m.k // groups)
    weight = m.part("qweight", (m.n, m.whole(m.k, 4, "inputs")), "I32")
    scales = m.numbers("scales", (m.n, 8 * outputs))
    zeros = m.part("qzeros", (m.n, outputs), "I32")
    form = Form(4, "unsigned", m.group(groups), scales.kind, "zero")
    return Stored(form, lambda: unpack(weight.read(), zeros.read(), scales.numbers(), group))


def look_fast(m: Module) -> Stored:
    """A module of `gemv_fast`."""
    n, k = m.n, m.k
    groups = m.pick(lambda bits, groups: {"scales": (8 * zeros_width(k, k // groups), n)})[1]
    rows = 8 * zeros_width(k, k // groups)
    if n % ROWS or k % INPUTS:
        raise ValueError(f"{n} × {k} is not in blocks of {ROWS} × {INPUTS}")
    weight = m.part("qweight", (n // ROWS, k), "I16")
    scales = m.numbers("scales", (rows, n))
    zeros = m.part("scaled_zeros" if m.has("scaled_zeros") else "qzeros", (rows, n), *FLOATS)
    form = Form(4, "unsigned", m.group(groups), scales.kind, "zero")
    group = k // groups
    return Stored(form, lambda: unpack_fast(weight.read(), zeros.numbers(), scales.numbers(), group))


def unpack(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int, bias: np.ndarray | None = None
) -> QuantizedLinear:
    """The weight that `gemv` tensors hold, bit for bit; their shapes have been checked."""
    groups = qweight.shape[1] * 8 // group
    return QuantizedLinear(
        nibbles.unpack(qweight),
        np.ascontiguousarray(scales[:, :groups]),
        zeros=np.ascontiguousarray(nibbles.unpack(qzeros)[:, :groups]),
        bias=bias,
    )


def unpack_fast(
    qweight: np.ndarray,
    scaled_zeros: np.ndarray,
    scales: np.ndarray,
    group: int,
    bias: np.ndarray | None = None,
) -> QuantizedLinear:
    """The weight that `gemv_fast` tensors hold, bit for bit; their shapes have been checked.

    Raises ValueError where a scaled zero is no whole multiple 0…15 of its scale.
    """
    blocks, k = qweight.shape
    groups = k // group
    # word (n%4)·16 + (k%64)//32·8 + k%8 of a block, nibble (k%32)//8
    codes = nibbles.unpack(qweight).reshape(blocks, k // INPUTS, ROWS, 2, 8, 4)
    codes = codes.transpose(0, 2, 1, 3, 5, 4).reshape(blocks * ROWS, k)
    s = scales[:groups].T.astype(np.float32)
    exact = np.divide(-scaled_zeros[:groups].T.astype(np.float32), s, out=np.zeros_like(s), where=s != 0)
    zeros = np.rint(exact)
    if not (np.abs(exact - zeros) < 0.02).all() or not ((zeros >= 0) & (zeros <= 15)).all():
        raise ValueError("a scaled zero is no multiple 0…15 of its scale")
    return QuantizedLinear(
        codes, np.ascontiguousarray(scales[:groups].T), zeros=zeros.astype(np.uint8), bias=bias
    )
