"""The CUDA backend: a model's ops, recorded once as kernel launches; steps are CUDA graphs.

Nothing here imports torch, and nothing of CUDA is loaded before a device is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tinychat.backends.cuda_device import free_memory, open_modules
from tinychat.backends.cuda_pack import Loader
from tinychat.backends.interface import BLOCK, LargestLogits, Step, memories_of
from tinychat.base.errors import (
    DeviceLostError,
    MemoryBudgetError,
    TinychatError,
    UnsupportedModelError,
    UsageError,
)
from tinychat.base.machine import human_bytes
from tinychat.kernels_cuda import experts, head, layout
from tinychat.kernels_cuda.attention import MAX_HEAD, Attention, Shape
from tinychat.kernels_cuda.driver import DeviceError, OutOfMemoryError
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.modules import Modules
from tinychat.kernels_cuda.program import Buffer, Program, program_sources
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import AttentionConfig, ModelConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy

MAX_ROWS = 512
WORKSPACE = 64 << 20  # for attention's spans: 16 rows of 32 heads at 16,000 tokens of context


class CudaBackend:
    """Implements `Backend`. Rows do not depend on each other: any chunking gives the same bits."""

    name = "cuda"
    row_independent = True
    max_spans = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        *,
        kv_bits: int = 16,
        modules: Modules | None = None,
        tell: Callable[[str], None] | None = None,
    ):
        """modules: a device and its compiler, in place of this machine's. tell hears of what takes long.

        Raises UsageError for an unknown setting or where there is no usable GPU, MemoryBudgetError.
        """
        if kv_bits not in (8, 16):
            raise UsageError(f"kv_bits={kv_bits!r} is not known.", "Use 8 or 16.")
        self.cfg: ModelConfig = checkpoint.config
        self.memories = memories_of(self.cfg)
        self.kv_bits = kv_bits
        c = self.cfg
        if c.head_dim > MAX_HEAD:
            raise UnsupportedModelError(
                f"{checkpoint.path.name} has heads of {c.head_dim} channels; {MAX_HEAD} is the most.",
                "Use --device cpu.",
            )
        if c.n_experts > experts.MOST:
            raise UnsupportedModelError(
                f"{checkpoint.path.name} has {c.n_experts} experts in a layer; {experts.MOST} are the most.",
                "Use --device cpu.",
            )
        self._modules = modules or open_modules()
        self._device = self._modules.device
        self.max_rows = MAX_ROWS
        self._blocks = 0
        a = c.layers[0].mixer  # the others differ in rope and window only
        scale = a.scale or a.head_dim**-0.5
        self._shape = Shape(c.n_layers, a.n_heads, a.n_kv_heads, a.head_dim, kv_bits, scale, a.soft_cap)
        self._program: Program | None = None
        with self._on_device():
            family = FAMILIES[c.family]
            loader = Loader(checkpoint, policy or WeightPolicy(), family, self._modules, tell)
            weights = family.load(loader, c)
            self._modules.prepare([*loader.sources, *program_sources(self._shape)])
            attention = Attention(self._modules, self._shape, WORKSPACE)
            program = Program(self._modules, attention, MAX_ROWS)
            family.forward(_Recorder(program), c, weights)
            program.build()
            self._program = program

    def describe(self) -> dict[str, Any]:
        """What runs: backend, isa, act_bits, kv_bits, threads."""
        return {
            "backend": self.name,
            "isa": f"sm_{self._device.capability}",
            "act_bits": 16,
            "kv_bits": self.kv_bits,
            "threads": None,
            "gpu": self._device.name,
        }

    def free_memory(self) -> int:
        """Bytes that the device can still give."""
        with self._on_device():
            return free_memory(self._device)

    def copy_bandwidth(self) -> float:
        """GB/s of a plain copy within the device, bytes read and written: the measure for decoding."""
        size = min(1 << 30, self.free_memory() // 4)
        with self._on_device():
            a, b = self._device.allocate(size), self._device.allocate(size)
            return (
                max(2 * size / self._device.seconds(lambda: self._device.copy(a, b)) for _ in range(5)) / 1e9
            )

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        """Layers of that memory, and KV heads of each."""
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block of BLOCK slots: keys and values of all layers."""
        return self._shape.block_bytes

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a KV pool of so many blocks, in device memory; if it grows, it is copied."""
        with self._on_device():
            self._open().set_cache(n_blocks)
        self._blocks = n_blocks

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        with self._on_device():
            self._device.copy(self._block(dst), self._block(src))

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """What the blocks hold: uint8 [n blocks, kv_bytes_per_block]."""
        out = np.empty((len(block_table), self.kv_bytes_per_block()), np.uint8)
        with self._on_device():
            for to, block in zip(out, block_table, strict=True):
                self._device.download(to, self._block(int(block)))
            self._device.synchronize()
        return out

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """What `read_blocks` gave, into these blocks."""
        with self._on_device():
            for row, block in zip(data, block_table, strict=True):
                self._device.upload(self._block(int(block)), np.ascontiguousarray(row))
            self._device.synchronize()

    def move_slots(self, block_table: np.ndarray, src: np.ndarray, dst: np.ndarray, memory: int = 0) -> None:
        """Keys and values of the logical slots `src` over those of `dst`."""
        with self._on_device():
            p = self._open()
            p.set_table(block_table)
            a, b = (p.upload(np.ascontiguousarray(x, np.int32)) for x in (src, dst))
            p.attention.move(p.pool, p.inputs.blocks, a, b, src.shape[2])
            self._device.synchronize()

    def value_spread(self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0) -> np.ndarray:
        """How far each slot's value lies from the weighted mean: float32 [layers, kv_heads, n]."""
        out = np.empty(weights.shape, np.float32)
        with self._on_device():
            p = self._open()
            p.set_table(block_table)
            w, to = p.upload(np.ascontiguousarray(weights, np.float32)), self._device.allocate(out.nbytes)
            p.attention.value_spread(p.pool, p.inputs.blocks, w, to, out.shape[2])
            self._device.download(out, to)
            self._device.synchronize()
        return out

    def turn_keys(self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0) -> None:
        """Rotate the cached keys of the first slots by `delta` positions."""
        ropes = [layer.mixer.rope for layer in self.cfg.layers]
        with self._on_device():
            p = self._open()
            p.set_table(block_table)
            for rope in {*ropes} - {None}:
                here = np.array([r == rope for r in ropes])[:, None, None]  # zero turns nothing
                turns = p.upload(np.ascontiguousarray(np.where(here, delta, 0), np.int32))
                f = rope.frequencies().astype(np.float64)
                p.attention.turn(p.pool, p.inputs.blocks, turns, p.upload(f), delta.shape[2], len(f))
                self._device.synchronize()

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [T - logits_from, vocab]."""
        return self._run(step, head.LOGITS)

    def step_greedy(self, step: Step) -> np.ndarray:
        """The argmax of each asked row, lowest id on a tie, or -1: int32 [T - logits_from]."""
        return self._run(step, head.ARGMAX)[:, 0]

    def step_largest(self, step: Step, temperature: float) -> list[LargestLogits]:
        """The largest logits of each asked row, of which there may be head.ROWS."""
        rows = self._run(step, head.TOP, 1 / temperature if temperature else 0.0)
        of = self._open().steps

        def whole(row: int) -> np.ndarray:
            with self._on_device():
                if self._open().steps != of:
                    raise RuntimeError("another step has written over these logits")
                return self._program.logits(row)

        return [self._largest(row, partial(whole, i)) for i, row in enumerate(rows)]

    def _largest(self, row: np.ndarray, whole: Callable[[], np.ndarray]) -> LargestLogits:
        *_, n, total = row
        ids, values = row[:n].astype(np.int64), row[head.LARGEST :][:n].view(np.float32)
        return LargestLogits(ids, values, self.cfg.vocab_size, float(total.view(np.float32)), whole)

    def close(self) -> None:
        """Release memory. Idempotent."""
        self._program = None

    def _run(self, step: Step, wanted: str, inverse_temperature: float = 0.0) -> np.ndarray:
        (span,) = step.spans
        (slots,) = span.memories
        ids, rows = span.token_ids, len(span.token_ids)
        kind = np.float32 if wanted == head.LOGITS else np.int32
        out = np.empty((rows - span.logits_from, head.columns(wanted, self.cfg.vocab_size)), kind)
        with self._on_device():
            program = self._open()
            if not 1 <= rows <= MAX_ROWS:
                raise ValueError(f"a step has 1 to {MAX_ROWS} rows, not {rows}")
            if wanted == head.TOP and len(out) > head.ROWS:
                raise ValueError(f"the largest logits of {head.ROWS} rows are had, not of {len(out)}")
            if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
                raise ValueError("a token id is outside the vocabulary")
            table = slots.table
            if len(table) * BLOCK < slots.length + rows:
                raise ValueError("the block table does not cover the step")
            if len(table) > self._blocks or table.min() < 0 or table.max() >= self._blocks:
                raise ValueError("the block table names blocks that are not there")
            program.run(
                ids, span.position, slots.length, table, wanted, out, slots.scores, slots.scored_rows,
                inverse_temperature,
            )  # fmt: skip
        return out

    def _open(self) -> Program:
        if self._program is None:
            raise TinychatError("The model is closed.", "Load it again.")
        return self._program

    def _block(self, i: int) -> Any:
        size = self.kv_bytes_per_block()
        return self._open().pool[i * size : (i + 1) * size]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """What the driver says, in words."""
        try:
            self._device.enter()
            yield
        except DeviceError as e:
            raise self._in_words(e) from e

    def _in_words(self, e: DeviceError) -> TinychatError:
        name = self._device.name
        if isinstance(e, OutOfMemoryError):
            with suppress(DeviceError):  # the device may be lost as well
                return MemoryBudgetError(
                    f"{name} has not enough memory: {human_bytes(self._device.memory()[0])} are free.",
                    "Try a smaller --ctx or model, close other programs on the GPU, or use --device cpu.",
                )
        return DeviceLostError(
            f"{name} failed ({e}).",
            "What was said is kept. Start again; if it happens again, use --device cpu.",
        )


@dataclass(eq=False)
class _Value:
    """A handle: `floats` holds it in fp32, `halves` as linears read it; either may be missing. A token has
    `each` rows of it: one, or one with each expert that it takes.
    """

    cols: int
    floats: Buffer | None = None
    halves: Buffer | None = None
    each: int = 1


@dataclass(eq=False)
class _Heads:
    """A part of a qkv value, and how it is to be rotated."""

    qkv: _Value
    attention: AttentionConfig
    rope: RopeConfig | None = None


class _Recorder:
    """Implements `Ops` by writing down what to launch."""

    def __init__(self, program: Program):
        self.program = program
        self.tables: dict[RopeConfig, Buffer] = {}

    def embed(self, weight, scale=1.0):
        (w,) = weight
        return _Value(w.shape.k, floats=self.program.embed(w, scale))

    def rms_norm(self, x, weight, eps, add_to=None):
        if add_to is not None:
            self.program.rms_norm_add(x.floats, weight, x.cols, eps, add_to.floats)
            return _Value(x.cols, floats=add_to.floats)
        return _Value(x.cols, halves=self.program.rms_norm(x.floats, weight, x.cols, eps))

    def linear(self, x, weight, add_to=None):
        cols = sum(w.shape.n for w in weight)
        out = self.program.floats(cols) if add_to is None else add_to.floats
        column = 0
        for w in weight:
            self.program.linear(w, self._input(x, w), out, column, cols, add_to is not None)
            column += w.shape.n
        return _Value(cols, floats=out)

    def split_heads(self, qkv, attention):
        return _Heads(qkv, attention), _Heads(qkv, attention), _Heads(qkv, attention)

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        c, qkv = q.attention, q.qkv
        offset = 0
        for weight, heads in ((q_weight, c.n_heads), (k_weight, c.n_kv_heads)):
            n = weight.size // 4  # a head's, or all heads' as one
            spans = heads * c.head_dim // n
            self.program.norm_spans(qkv.floats, weight, n, offset, spans, qkv.cols, eps)
            offset += heads * c.head_dim
        return q, k

    def rope(self, q, k, rope):
        if rope not in self.tables:
            self.tables[rope] = self.program.rope_table(rope.frequencies(), rope.magnitude)
        return _Heads(q.qkv, q.attention, rope), _Heads(k.qkv, k.attention, rope)

    def attention(self, q, k, v, attention, layer):
        table = self.tables[q.rope] if q.rope else None
        pairs = len(q.rope.frequencies()) if q.rope else 0
        out = self.program.attend(q.qkv.floats, table, pairs, layer, attention.window)
        return _Value(attention.n_heads * attention.head_dim, halves=out)

    def silu_mul(self, gate_up):
        return self._gate("silu_mul", gate_up)

    def gelu_mul(self, gate_up):
        return self._gate("gelu_mul", gate_up)

    def route(self, scores, n, normalize):
        return experts.route(self.program, scores.floats, scores.cols, n, normalize)

    def expert_linear(self, x, weights, routes):
        alike: dict[tuple[int, layout.Shape], dict[int, DeviceLinear]] = {}  # a launch each
        for e, linears in enumerate(weights):
            column = 0
            for w in linears:
                alike.setdefault((column, w.shape), {})[e] = w
                column += w.shape.n
        out = self.program.floats(column * routes.taken)
        for (first, _), members in alike.items():
            share = routes.taken // x.each
            experts.products(self.program, routes, members, x.halves, share, out, first, column)
        return _Value(column, floats=out, each=routes.taken)

    def expert_sum(self, x, routes, add_to):
        experts.add(self.program, routes, x.floats, x.cols, add_to.floats)
        return _Value(x.cols, floats=add_to.floats)

    def lm_head(self, x, weight, scale=1.0, soft_cap=0.0):
        (w,) = weight
        self.program.head(w, self._input(x, w), scale, soft_cap)

    def _gate(self, name, gate_up):
        n, each = gate_up.cols // 2, gate_up.each
        return _Value(n, halves=self.program.gate(name, gate_up.floats, n, each), each=each)

    def _input(self, x: _Value, w: DeviceLinear) -> Buffer:
        """`x` as halves, in the order of the weight's inputs."""
        if w.perm is not None:
            if x.halves is not None:
                return self.program.reorder(x.halves, x.cols, w.perm)
            return self.program.halve(x.floats, x.cols, w.perm)
        if x.halves is None:
            x.halves = self.program.halve(x.floats, x.cols, None)
        return x.halves
