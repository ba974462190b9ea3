"""bitsandbytes' NF4: codes of a table of 16 floats, in blocks that run on from row to row.

For a linear of K inputs and N outputs; two codes to a byte, the earlier one in the upper half:

    weight                    uint8 [N·K/2, 1], all rows after each other
    weight.absmax             float32 [⌈N·K/B⌉], the largest number of each block of B (64) weights;
                              with double quantization uint8, by the table below
    weight.quant_map          float32 [16], the table of codes
    weight.nested_absmax      float32 [⌈N·K/B/C⌉], of blocks of C (256) absmax
    weight.nested_quant_map   float32 [256]: absmax = map[code] · nested_absmax + nested_offset
    weight.quant_state.bitsandbytes__nf4   JSON in uint8: blocksize, nested_blocksize, nested_offset, shape

Source: bitsandbytes 0.50, `functional.py`, `QuantState`.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np

from tinychat.formats.scheme import Module, Stored
from tinychat.formats.tensors import Tensor
from tinychat.network.weight_form import TABLES, Form
from tinychat.network.weights import QuantizedLinear

STATE = "weight_quant_state"
MAX_STATE = 4096  # bytes of the JSON
# tensors that are named as if the weight were a module, by the names of parts
_INFIX = re.compile(r"\.weight\.((?:nested_)?(?:absmax|quant_map)|quant_state)(?:\.bitsandbytes__nf4)?$")


def part_named(name: str) -> str:
    """The name of a tensor as that of a part: `q_proj.weight.absmax` is `q_proj`'s `weight_absmax`."""
    found = _INFIX.search(name)
    return f"{name[: found.start()]}.weight_{found[1]}" if found else name


def look(m: Module) -> Stored:
    """A module in NF4. The state is read at once: it has the size of the blocks."""
    n, k = m.n, m.k
    state = _state(m.part(STATE, m.peek(STATE).shape, "U8"))
    block = _size(state, "blocksize", 64)
    if state.get("shape") != [n, k] or state.get("quant_type") != "nf4":
        raise ValueError(f"its state is of {state.get('quant_type')} {state.get('shape')}, not nf4 {[n, k]}")
    if n * k % 2:
        raise ValueError("an odd number of weights")
    count = -(-n * k // block)
    weight = m.part("weight", (n * k // 2, 1), "U8")
    table = m.part("weight_quant_map", (16,), "F32")
    nested = m.has("weight_nested_absmax")
    absmax = m.part("weight_absmax", (count,), "U8" if nested else "F32")
    if nested:
        inner = _size(state, "nested_blocksize", 256)
        above = m.part("weight_nested_absmax", (-(-count // inner),), "F32")
        values = m.part("weight_nested_quant_map", (256,), "F32")
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise ValueError(f"nested_offset is {offset!r}")
    group = math.gcd(k, block)  # a block that runs on into the next row ends at a multiple of this

    def read() -> QuantizedLinear:
        if not np.array_equal(table.read().view(np.uint32), TABLES["nf4"].view(np.uint32)):
            raise ValueError("its table of codes is not that of NF4")
        bytes_ = weight.read().reshape(-1)
        codes = np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(n, k)
        sizes = absmax.read()
        if nested:
            of_block = np.repeat(above.read(), inner)[:count]
            sizes = values.read()[sizes] * of_block + np.float32(offset)
        scales = sizes[np.arange(n * k // group) * group // block].reshape(n, k // group)
        return QuantizedLinear(codes, scales.astype(np.float32), table="nf4")

    return Stored(Form(4, "nf4", m.group(k // group), "fp32"), read)


def _state(t: Tensor) -> dict:
    """The JSON object in a tensor of bytes."""
    if len(t.shape) != 1 or t.shape[0] > MAX_STATE:
        raise ValueError(f"its state has the shape {list(t.shape)}")
    try:
        state = json.loads(t.read().tobytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"its state is no JSON: {e}") from e
    if not isinstance(state, dict):
        raise ValueError("its state is no JSON object")
    return state


def _size(state: dict, name: str, usual: int) -> int:
    size = state.get(name, usual)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1 << 16:
        raise ValueError(f"{name} is {size!r}")
    return size
