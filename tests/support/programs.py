"""Small programs of the CPU kernels, so that a test can put numbers in and look at what comes out."""

from __future__ import annotations

import numpy as np

from tinychat.backends.cpu_pack import PackedLinear
from tinychat.kernels_cpu import _native
from tinychat.network.weights import DenseLinear, QuantizedLinear

ISAS = _native.isas()
BEST = ISAS[0]


class Bench:
    """A program whose inputs are set by the test. Rows: one step of `run(rows)`."""

    def __init__(self, isa: str = BEST, threads: int = 2, max_rows: int = 64):
        self.p = _native.Program(isa, threads, max_rows)

    def input(self, x: np.ndarray):
        """fp32 rows with `x` in them."""
        f = self.p.floats(x.shape[1])
        self.p.array(f)[: len(x)] = x
        return f

    def view(self, floats, rows: int) -> np.ndarray:
        """A copy of the first rows of a buffer."""
        return self.p.array(floats)[:rows].copy()

    def run(self, rows: int, position: int = 0, length: int = 0, table: np.ndarray | None = None) -> None:
        """Run the recorded ops on one span; no logits. table: of the one memory, where the ops have one."""
        memories = () if table is None else ((table, length, None, 0),)
        self.p.run(((np.zeros(rows, np.int32), position, rows, memories),))


def input_rows(program, w: PackedLinear, act_bits: int):
    """A buffer in the form that `w` reads."""
    quantized = w.native.quantized
    return program.rows(w.shape[1], not quantized, act_bits if quantized else 0, w.native.group)


def run_linear(
    weights: list[PackedLinear], x: np.ndarray, *, isa=BEST, threads=2, act_bits=8, residual=None
) -> np.ndarray:
    """Outputs of linears that share an input, side by side: float32 [rows, sum of out]."""
    b = Bench(isa, threads, max_rows=max(64, len(x)))
    source = b.input(x)
    parts, column = [], 0
    for w in weights:
        rows = input_rows(b.p, w, act_bits)
        b.p.quantize(source, w.perm, rows, False)
        parts.append((w.native, rows, column))
        column += w.shape[0]
    out = b.p.floats(column) if residual is None else b.input(residual)
    b.p.linear(parts, out, None if residual is None else out)
    b.run(len(x))
    return b.view(out, len(x))


def quantize_rows(x: np.ndarray, bits: int) -> np.ndarray:
    """What the kernels make of activations, written plainly: integers with one fp32 scale for each 32 inputs.

    In fp32 as the kernels do it, so that a value half way between two integers rounds alike; returns float64.
    """
    g = x.astype(np.float32).reshape(len(x), -1, 32)
    top = np.float32(127 if bits == 8 else 32767)
    peak = np.abs(g).max(axis=2, keepdims=True)
    inv = np.divide(top, peak, out=np.zeros_like(peak), where=peak > 1e-30)
    q = np.rint(g * inv).astype(np.float64)
    return (q * (peak * (np.float32(1) / top)).astype(np.float64)).reshape(x.shape)


FORMS = {
    "symmetric": "4-bit, zero 8",
    "zeros": "4-bit, zeros 0…15",
    "zeros16": "4-bit, some zero is 16",
    "offsets": "4-bit, fp16 offsets",
    "float": "4-bit, fp32 scales that fp16 does not hold",
    "int8": "8-bit, fp16 scales",
    "int8-float": "8-bit, fp32 scales",
}


def random_linear(rng: np.random.Generator, form: str, n: int, k: int, group: int, bias: bool = False):
    """A canonical weight of the form."""
    b = rng.normal(size=n).astype(np.float32) if bias else None
    groups = k // group
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * 0.02).astype(np.float16)
    if form.startswith("int8"):
        codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
        if form == "int8-float":
            scales = scales.astype(np.float32) * np.float32(1.0001)
        return QuantizedLinear(codes, scales, bias=b, bits=8)
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    if form == "symmetric":
        return QuantizedLinear(codes, scales, zeros=np.full((n, groups), 8, np.uint8), bias=b)
    if form == "zeros":
        return QuantizedLinear(codes, scales, zeros=rng.integers(0, 16, (n, groups), dtype=np.uint8), bias=b)
    if form == "zeros16":
        zeros = rng.integers(0, 17, (n, groups), dtype=np.uint8)
        zeros[0, 0] = 16
        return QuantizedLinear(codes, scales, zeros=zeros, bias=b)
    offsets = (rng.normal(size=(n, groups)) * 0.1).astype(np.float16)
    if form == "offsets":
        return QuantizedLinear(codes, scales, offsets=offsets, bias=b)
    return QuantizedLinear(codes, scales.astype(np.float32) * np.float32(1.0001), offsets=offsets, bias=b)


def random_dense(rng: np.random.Generator, kind: str, n: int, k: int, bias: bool = False) -> DenseLinear:
    """fp32, fp16 or bf16."""
    w = (rng.normal(size=(n, k)) / k**0.5).astype(np.float32)
    b = rng.normal(size=n).astype(np.float32) if bias else None
    if kind == "fp16":
        return DenseLinear(w.astype(np.float16), b)
    if kind == "bf16":
        return DenseLinear((w.view(np.uint32) >> 16).astype(np.uint16), b, bf16=True)
    return DenseLinear(w, b)
