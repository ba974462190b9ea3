"""Small programs of the CPU kernels, so that a test can put numbers in and look at what comes out."""

from __future__ import annotations

import numpy as np

from tinychat.backends.cpu_pack import PackedLinear
from tinychat.kernels_cpu import _native
from tinychat.network.weight_form import Coded
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


# Forms of files, and of the algebra between them: bits, table, group, scale, offset ("zero": integers)
CODED = {
    "q2_k": (2, None, 16, "int4", "int4"),
    "q3_k": (3, None, 16, "int6 signed", None),
    "q4_k": (4, None, 32, "int6", "int6"),
    "q5_0": (5, None, 32, "fp16", None),
    "q5_1": (5, None, 32, "fp16", "fp16"),
    "q5_k": (5, None, 32, "int6", "int6"),
    "q6_k": (6, None, 16, "int8", None),
    "iq4_nl": (4, "iq4_nl", 32, "fp16", None),
    "iq4_xs": (4, "iq4_nl", 32, "int6 signed", None),
    "mxfp4": (4, "e2m1", 32, "e8m0", None),
    "nvfp4": (4, "e2m1", 16, "e4m3", None),
    "tq2_0": (2, None, 256, "fp16", None),
    "2-bit": (2, None, 64, "fp16", "zero"),
    "3-bit": (3, None, 64, "fp16", "zero"),
    "3-bit wide": (3, None, 32, "fp32", "fp32"),
    "4-bit halves": (4, None, 16, "fp16", "zero"),
    "4-bit fp32": (4, None, 128, "fp32", None),
    "6-bit": (6, None, 96, "fp16", "fp16"),
    "8-bit int6": (8, None, 32, "int6", None),
    "8-bit fp32": (8, None, 64, "fp32", None),
    "mixed": (5, None, 32, "int6", "fp16"),
    "fp8": (8, "e4m3", 128, "fp32", None),
    "mxfp8": (8, "e4m3", 32, "e8m0", None),
    "nf4": (4, "nf4", 64, "fp32", None),
    "nf4 fp16": (4, "nf4", 96, "fp16", None),
}
FLOAT_CODES = ("e4m3", "nf4")  # tables that take activations as they are


def random_coded(rng: np.random.Generator, form: str, n: int, k: int, bias: bool = False) -> QuantizedLinear:
    """A weight of one of CODED; k must be a multiple of 256 where integers have an fp16."""
    bits, table, group, scale, offset = CODED[form]

    def beside(kind: str | None, sign: int):
        word, _, signed = (kind or "").partition(" ")
        if word == "":
            return None
        if word.startswith("int"):
            half = (rng.uniform(0.5, 1.5, (n, k // 256)) * sign * 0.002).astype(np.float16)
            top = 1 << int(word[3])
            if signed or word == "int8":
                codes = rng.integers(-top // 2, top // 2, (n, k // group), dtype=np.int8)
            else:
                codes = rng.integers(0, top, (n, k // group), dtype=np.uint8)
            return Coded(word, codes, half)
        if word == "e8m0":
            return Coded(word, rng.integers(117, 123, (n, k // group), dtype=np.uint8))
        if word == "e4m3":
            times = rng.uniform(0.001, 0.002, (n, 1)).astype(np.float32)
            return Coded(word, rng.integers(1, 127, (n, k // group), dtype=np.uint8), times)
        floats = rng.uniform(0.5, 1.5, (n, k // group)) * sign * 0.02
        return floats.astype(np.float16 if word == "fp16" else np.float32)

    b = rng.normal(size=n).astype(np.float32) if bias else None
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    if table == "e4m3":
        codes[codes & 127 == 127] = 0  # no numbers
    elif bits == 8:
        codes = codes.view(np.int8)
    zeros = None
    if offset == "zero":
        zeros = rng.integers(0, 1 << bits, (n, k // group), dtype=np.uint8)
    offsets = beside(None if offset == "zero" else offset, -1)
    return QuantizedLinear(codes, beside(scale, 1), zeros, offsets, b, bits=bits, table=table)


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
