"""The CPU backend: a model's ops, recorded once as a program of SIMD kernels and replayed each step.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinychat.backends import pack_file as packs
from tinychat.backends.interface import Span, Step, memories_of
from tinychat.backends.pack_file import PackedLinear
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.kernels_cpu import _native
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy

MAX_ROWS = 512


def _anonymous(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # attention jumps from block to block: fewer TLB misses
    return memory


class CpuBackend:
    """Implements `Backend`. Rows do not depend on each other: any chunking gives the same bits."""

    name = "cpu"
    row_independent = True
    survives_fork = True  # its threads are started anew

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        *,
        threads: int | None = None,
        act_bits: int | None = None,
        kv_bits: int = 16,
        tell: Callable[[str], None] | None = None,
    ):
        """tell hears of what takes long.

        Raises UsageError for an unknown setting, or a TINYCHAT_ISA that this CPU does not run."""
        if act_bits not in (None, 8, 16):
            raise UsageError(f"act_bits={act_bits!r} is not known.", "Use 8 or 16.")
        if kv_bits not in (8, 16):
            raise UsageError(f"kv_bits={kv_bits!r} is not known.", "Use 8 or 16.")
        try:
            self.isa = _native.isa()
        except RuntimeError as e:
            raise UsageError(*str(e).split("\n", 1)) from None
        self.cfg: ModelConfig = checkpoint.config
        self.memories = memories_of(self.cfg)
        # Every ISA has an exact 8-bit dot product and it is the fastest path, so it runs unless asked.
        self.act_bits = act_bits or 8
        self.kv_bits = kv_bits
        self.threads = threads or _native.cores()
        family = FAMILIES[self.cfg.family]
        self._pack = packs.load(checkpoint, policy or WeightPolicy(), family, self.threads, tell)
        weights = family.load(self._pack, self.cfg)
        recorder = _Recorder(self.cfg, self.act_bits)
        family.forward(recorder, self.cfg, weights)
        self._program = recorder.build(_native.Program(self.isa, self.threads, MAX_ROWS))
        self.max_rows = MAX_ROWS
        self._memory: mmap.mmap | None = None
        self._pool = np.empty(0, np.uint8)
        self._blocks = 0

    def describe(self) -> dict[str, Any]:
        """What runs: backend, isa, act_bits, kv_bits, threads."""
        return {
            "backend": self.name,
            "isa": self.isa,
            "act_bits": self.act_bits,
            "kv_bits": self.kv_bits,
            "threads": self.threads,
        }

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        """Layers of that memory, and KV heads of each."""
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block of BLOCK slots: keys and values of all layers."""
        c = self.cfg
        return _native.kv_block_bytes(c.n_layers, c.n_kv_heads, c.head_dim, self.kv_bits)

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a KV pool of so many blocks; memory is touched only as blocks are used."""
        size = max(1, n_blocks) * self.kv_bytes_per_block()
        memory, blocks = self._memory, self._blocks
        if grows := memory is not None and n_blocks > blocks:
            self._use_pool(None, 0)  # nothing may point into it while the system moves it
        try:
            if grows:
                memory.resize(size)
            else:
                memory, blocks = _anonymous(size), n_blocks
            blocks = n_blocks
        except (OSError, MemoryError) as e:
            raise MemoryBudgetError(
                f"The KV cache needs {size / 1e9:.1f} GB: {os.strerror(errno.ENOMEM)}.",
                "Ask for a smaller --ctx.",
            ) from e
        finally:
            if memory is not None:
                self._use_pool(memory, blocks)

    def _use_pool(self, memory: mmap.mmap | None, n_blocks: int) -> None:
        c = self.cfg
        self._pool = np.empty(0, np.uint8) if memory is None else np.frombuffer(memory, np.uint8)
        self._program.set_kv(self._pool, n_blocks, c.n_layers, c.n_kv_heads, c.head_dim, self.kv_bits)
        self._memory, self._blocks = memory, n_blocks

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        blocks = self._pool.reshape(max(1, self._blocks), -1)
        blocks[dst] = blocks[src]

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """What the blocks hold: uint8 [n blocks, kv_bytes_per_block]."""
        return self._pool.reshape(max(1, self._blocks), -1)[block_table]

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """What `read_blocks` gave, into these blocks."""
        self._pool.reshape(max(1, self._blocks), -1)[block_table] = data

    def move_slots(self, block_table: np.ndarray, src: np.ndarray, dst: np.ndarray, memory: int = 0) -> None:
        """Keys and values of the logical slots `src` over those of `dst`."""
        self._program.move_slots(*(np.ascontiguousarray(a, np.int32) for a in (block_table, src, dst)))

    def value_spread(self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0) -> np.ndarray:
        """How far values lie from their weighted mean, float32 [layers, kv_heads, n]."""
        out = np.empty(weights.shape, np.float32)
        self._program.value_spread(
            np.ascontiguousarray(block_table, np.int32), np.ascontiguousarray(weights, np.float32), out
        )
        return out

    def turn_keys(self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0) -> None:
        """Rotate the cached keys of the first slots by `delta` positions."""
        table = np.ascontiguousarray(block_table, np.int32)
        ropes = [self.cfg.rope_of(layer) for layer in range(self.cfg.n_layers)]
        for rope in {*ropes} - {None}:
            here = np.array([r == rope for r in ropes])[:, None, None]  # zero turns nothing
            frequencies = [float(f) for f in rope.frequencies()]
            self._program.turn_keys(
                table, frequencies, np.ascontiguousarray(np.where(here, delta, 0), np.int32)
            )

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [T - logits_from, vocab]."""
        (span,) = step.spans
        out = np.empty((len(span.token_ids) - span.logits_from, self.cfg.vocab_size), np.float32)
        self._run(span, out, None)
        return out

    def step_greedy(self, step: Step) -> np.ndarray:
        """What `Backend.step_greedy` says; no logits are written."""
        (span,) = step.spans
        out = np.empty(len(span.token_ids) - span.logits_from, np.int32)
        self._run(span, None, out)
        return out

    def timings(self, step: Step) -> list[tuple[str, float]]:
        """(op, seconds) of one greedy step: what `docs/performance.md` breaks a token down with."""
        self._program.set_timing(True)
        try:
            self.step_greedy(step)
            return self._program.timings()
        finally:
            self._program.set_timing(False)

    def close(self) -> None:
        """Release threads and memory. Idempotent."""
        self._program = self._memory = None
        self._pool = np.empty(0, np.uint8)

    def _run(self, span: Span, logits: np.ndarray | None, greedy: np.ndarray | None) -> None:
        if self._program is None:
            raise TinychatError("The model is closed.", "Load it again.")
        self._pack.check_usable()
        (slots,) = span.memories
        self._program.run(
            np.ascontiguousarray(span.token_ids, np.int32),
            span.position,
            slots.length,
            np.ascontiguousarray(slots.table, np.int32),
            span.logits_from,
            logits,
            greedy,
            slots.scores,
            slots.scored_rows,
        )


@dataclass(eq=False)
class _Buffer:
    """Memory that an op writes and later ones read. `rows`: what linears read; else plain fp32."""

    cols: int
    rows: bool = False
    as_float: bool = False
    bits: int = 0  # integers of 8 or 16 bits
    group: int = 0  # whose sums the readers' weights need
    routes: _Routes | None = None  # its rows are their slots
    native: Any = None
    first: int = -1
    last: int = -1

    def key(self) -> tuple:
        """Buffers with the same key may take each other's place."""
        experts = self.routes and self.routes.key()
        return self.cols, self.rows, self.as_float, self.bits, self.group, experts

    def allocate(self, program: Any) -> Any:
        n = self.routes.native.slots if self.routes else 0
        if self.rows:
            return program.rows(self.cols, self.as_float, self.bits, self.group, n)
        return program.floats(self.cols, n)


@dataclass(eq=False)
class _Routes:
    """Which experts each row takes. A buffer too: one layer's may take the place of another's."""

    n_experts: int
    taken: int
    native: Any = None
    first: int = -1
    last: int = -1

    def key(self) -> tuple:
        return "routes", self.n_experts, self.taken

    def allocate(self, program: Any) -> Any:
        return program.routes(self.n_experts, self.taken)


@dataclass(eq=False)
class _Value:
    """A handle: `floats` holds it in fp32, `rows` as linears read it; either may be missing.

    tail: only the rows that get logits, moved to the front.
    """

    cols: int
    floats: _Buffer | None = None
    rows: _Buffer | None = None
    tail: bool = False
    consumed: bool = False


@dataclass(eq=False)
class _Heads:
    """A part of a qkv value, and how it is to be rotated."""

    qkv: _Value
    cfg: ModelConfig
    rope: RopeConfig | None = None


@dataclass(eq=False)
class _Record:
    uses: list[_Buffer | _Routes]
    emit: Callable[[Any], None]


@dataclass
class _Recorder:
    """Implements `Ops` by writing down what to run. Norms and activations take the form that is read."""

    cfg: ModelConfig
    act_bits: int
    records: list[_Record] = field(default_factory=list)
    tables: dict[RopeConfig, _Buffer] = field(default_factory=dict)

    # Ops

    def embed(self, weight, scale=1.0):
        (w,) = weight
        out = _Buffer(w.shape[1])
        self._record([out], lambda p: p.embed(w.native, out.native, scale))
        return _Value(out.cols, floats=out)

    def rms_norm(self, x, weight, eps, add_to=None):
        if add_to is not None:
            x, y = x.floats, add_to.floats
            self._record([x, y], lambda p: p.rms_norm_add(x.native, weight, eps, y.native))
            return _Value(y.cols, floats=y)
        out, source = _Value(x.cols, rows=_Buffer(x.cols, rows=True)), x.floats
        self._record(
            [source, out.rows],
            lambda p: p.rms_norm(source.native, weight, eps, out.rows.native, out.tail),
        )
        return out

    def linear(self, x, weight, add_to=None):
        parts, column = [], 0
        for w in weight:
            parts.append((w.native, self._input(x, w, self.act_bits), column))
            column += w.shape[0]
        out = _Buffer(column) if add_to is None else add_to.floats
        add = None if add_to is None else out
        self._record(
            [b for _, b, _ in parts] + [out],
            lambda p: p.linear([(w, b.native, c) for w, b, c in parts], out.native, add and add.native),
        )
        return _Value(column, floats=out)

    def split_heads(self, qkv, cfg):
        return _Heads(qkv, cfg), _Heads(qkv, cfg), _Heads(qkv, cfg)

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        qkv, cols = q.qkv.floats, [n * q.cfg.head_dim for n in (q.cfg.n_heads, q.cfg.n_kv_heads)]
        self._record([qkv], lambda p: p.norm_heads(qkv.native, q_weight, k_weight, *cols, eps))
        return q, k

    def rope(self, q, k, rope):
        if rope not in self.tables:
            table = self.tables[rope] = _Buffer(rope.dim)
            frequencies = [float(f) for f in rope.frequencies()]

            def emit(p):
                table.native = p.rope_table(frequencies, rope.magnitude)

            self._record([table], emit)
        return _Heads(q.qkv, q.cfg, rope), _Heads(k.qkv, k.cfg, rope)

    def attention(self, q, k, v, layer):
        c, qkv = q.cfg, q.qkv.floats
        table = self.tables[q.rope] if q.rope else _Buffer(0)  # nothing is rotated
        out = _Buffer(c.n_heads * c.head_dim)
        heads = c.n_heads, c.n_kv_heads, c.head_dim, layer
        self._record([qkv, table], lambda p: p.rope_kv(qkv.native, table.native, *heads, c.attn_scale or 0.0))
        window, cap = c.window_of(layer), c.attn_soft_cap
        self._record([qkv, out], lambda p: p.attention(qkv.native, *heads, out.native, window, cap))
        return _Value(out.cols, floats=out)

    def silu_mul(self, gate_up):
        return self._gate(gate_up, "silu_mul")

    def gelu_mul(self, gate_up):
        return self._gate(gate_up, "gelu_mul")

    def _gate(self, gate_up, op):
        source, routes = gate_up.floats, gate_up.floats.routes
        rows = _Buffer(gate_up.cols // 2, rows=True, routes=routes)
        if routes is None:
            self._record([source, rows], lambda p: getattr(p, op)(source.native, rows.native))
        else:
            self._record(
                [routes, source, rows],
                lambda p: getattr(p, f"expert_{op}")(routes.native, source.native, rows.native),
            )
        return _Value(rows.cols, rows=rows)

    def route(self, scores, n, normalize):
        source, routes = scores.floats, _Routes(scores.cols, n)
        self._record([source, routes], lambda p: p.route(source.native, routes.native, normalize))
        return routes

    def expert_linear(self, x, weights, routes):
        columns = [sum(w.shape[0] for w in weights[0][:i]) for i in range(len(weights[0]) + 1)]
        inputs = self._expert_inputs(x, weights, routes)
        out = _Buffer(columns[-1], routes=routes)
        used = list({id(b): b for expert in inputs for b in expert}.values())

        def emit(p):
            experts = zip(weights, inputs, strict=True)
            parts = [[(w.native, b.native, c) for w, b, c in zip(*e, columns)] for e in experts]  # noqa: B905
            p.expert_linear(routes.native, parts, out.native)

        self._record([routes, *used, out], emit)
        return _Value(out.cols, floats=out)

    def expert_sum(self, x, routes, add_to):
        source, out = x.floats, add_to.floats
        self._record([routes, source, out], lambda p: p.expert_sum(routes.native, source.native, out.native))
        return _Value(out.cols, floats=out)

    def lm_head(self, x, weight, scale=1.0):
        (w,) = weight
        if x.consumed:
            raise NotImplementedError("the head's input is read by another op too")
        x.tail = True
        # The head always reads 16-bit activations: the demo model meets the reference argmax at 97.4 % of
        # positions instead of 96.5 %, and its weights take as long to read (docs/performance.md).
        rows = self._input(x, w, 16)
        cap = self.cfg.logit_soft_cap
        self._record([rows], lambda p: p.lm_head(w.native, rows.native, scale, cap))
        return None

    # Building

    def build(self, program: Any) -> Any:
        """Give every buffer memory, reusing what is no longer read, and emit the ops."""
        for i, r in enumerate(self.records):
            for b in r.uses:
                b.first = i if b.first < 0 else b.first
                b.last = i
        tables = set(map(id, self.tables.values()))
        free: dict[tuple, list[Any]] = {}
        for i, r in enumerate(self.records):
            for b in r.uses:
                if b.first == i and b.native is None and id(b) not in tables:
                    spare = free.get(b.key())
                    b.native = spare.pop() if spare else b.allocate(program)
            r.emit(program)
            for b in {id(b): b for b in r.uses}.values():
                if b.last == i and id(b) not in tables:
                    free.setdefault(b.key(), []).append(b.native)
        return program

    def _record(self, uses: list[_Buffer | _Routes], emit: Callable[[Any], None]) -> None:
        self.records.append(_Record(uses, emit))

    def _input(self, x: _Value, w: PackedLinear, bits: int) -> _Buffer:
        """`x` in the form that `w` reads: integers if it is quantized, in the order of its inputs."""
        quantized, group = w.native.quantized, w.native.group
        taken = x.rows is not None and x.rows.bits and (x.rows.bits, x.rows.group) != (bits, group)
        if x.rows is not None and w.perm is None and not (quantized and taken):
            self._want(x.rows, w, bits)  # a norm or activation: its own op writes the form
            x.consumed = True
            return x.rows
        out = _Buffer(x.cols, rows=True)
        self._want(out, w, bits)
        perm, tail = w.perm, x.tail
        if x.rows is not None:
            x.rows.as_float = True
            x.consumed = True
            source = x.rows
            self._record(
                [source, out],
                lambda p: p.quantize(source.native.floats, perm, out.native, False),
            )
        else:
            source = x.floats
            self._record([source, out], lambda p: p.quantize(source.native, perm, out.native, tail))
        return out

    def _expert_inputs(self, x: _Value, weights: Any, routes: _Routes) -> list[list[_Buffer]]:
        """For each expert, what its linears read: `x` in their form and order, a row for each slot."""
        forms = {(w.native.quantized, w.native.group, w.perm is None) for expert in weights for w in expert}
        x.consumed = True
        if x.rows.routes and len(forms) == 1 and weights[0][0].perm is None:
            self._want(x.rows, weights[0][0], self.act_bits)  # silu_mul writes the form
            return [[x.rows] * len(expert) for expert in weights]
        buffers: dict[tuple, _Buffer] = {}
        inputs, orders = [], []
        for expert in weights:
            mine, order = [], {}
            for w in expert:
                same = (i for i, other in enumerate(expert) if _same_order(other.perm, w.perm))
                key = w.native.quantized, w.native.group, next(same)
                if key not in buffers:
                    buffers[key] = _Buffer(x.cols, rows=True, routes=routes)
                    self._want(buffers[key], w, self.act_bits)
                mine.append(buffers[key])
                order[id(buffers[key])] = buffers[key], w.perm
            inputs.append(mine)
            orders.append(list(order.values()))
        x.rows.as_float = True
        source = x.rows
        self._record(
            [routes, source, *buffers.values()],
            lambda p: p.expert_input(
                routes.native, source.native.floats, [[(b.native, perm) for b, perm in o] for o in orders]
            ),
        )
        return inputs

    @staticmethod
    def _want(rows: _Buffer, w: PackedLinear, bits: int) -> None:
        if w.native.quantized:
            rows.bits, rows.group = bits, w.native.group
        else:
            rows.as_float = True


def _same_order(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
