"""The CPU backend: a model's ops, recorded once (`cpu_recorder`), replayed each step; and its KV cache.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinychat.backends import pack_store
from tinychat.backends.cpu_pack import CpuLayout, CpuWeights
from tinychat.backends.cpu_recorder import Recorder
from tinychat.backends.guessed import named, spread
from tinychat.backends.interface import MemorySpec, Slots, Span, States, Step, Tails, memories_of, with_tails
from tinychat.base import machine
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.kernels_cpu import _native
from tinychat.models import FAMILIES, predictor
from tinychat.network import eagle, further
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.eagle import Head
from tinychat.network.weight_policy import WeightPolicy

MAX_ROWS = 512


def _anonymous(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # attention jumps from block to block: fewer TLB misses
    return memory


@dataclass
class _Pool:
    """The KV blocks of one memory, or its states."""

    map: mmap.mmap | None = None
    blocks: int = 0
    bytes: np.ndarray = field(init=False)

    def __post_init__(self):
        self.bytes = np.empty(0, np.uint8) if self.map is None else np.frombuffer(self.map, np.uint8)

    def rows(self) -> np.ndarray:
        """uint8 [blocks, bytes of each]"""
        return self.bytes.reshape(max(1, self.blocks), -1)


class CpuBackend:
    """Implements `Backend`. Rows do not depend on each other: any chunking gives the same bits."""

    name = "cpu"
    row_independent = True
    max_spans = MAX_ROWS
    survives_fork = True  # its threads are started anew
    _program: Any = None
    step_largest = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        *,
        threads: int | None = None,
        act_bits: int | None = None,
        kv_bits: int = 16,
        tell: Callable[[str], None] | None = None,
        predicts: bool = False,
        head: Head | None = None,
    ):
        """tell hears of what takes long. predicts: have the layer that predicts further, if there is one.
        head: have this one in its place.

        Raises UsageError for an unknown setting, or a TINYCHAT_ISA that this CPU does not run."""
        cfg = checkpoint.config if predicts else checkpoint.config.without_further
        self._guessed = head.ids if head else None  # what the head's outputs stand for
        self.prepare(cfg if head is None else head.onto(checkpoint.config), threads, act_bits, kv_bits)
        self._n_outputs: int = getattr(checkpoint, "n_outputs", self.cfg.vocab_size)
        if head is not None:
            self._of_head["head"] = head.fingerprint(tell)
        memories = memories_of(self.cfg)
        self.memories = with_tails(memories) if kv_bits == 4 else memories
        family = FAMILIES[self.cfg.family]
        layout = CpuLayout(self.threads)
        policy = policy or WeightPolicy()
        self._packs = [pack_store.opened(checkpoint, policy, family, layout, tell)]
        weights = family.load(CpuWeights(self._packs[0]), self.cfg)
        if head is not None:
            self._packs.append(pack_store.opened(head, policy, eagle, layout))
            weights = replace(weights, further=eagle.load(CpuWeights(self._packs[1]), self.cfg))
        sources = sorted({a.source for a in self.cfg.attentions if a.source >= 0})
        recorder = Recorder(self.memories, self.act_bits, tuple(sources))
        family.forward(recorder, self.cfg, weights)
        for few in _parts(self.cfg):
            recorder.next_part()
            predictor(self.cfg)(recorder, self.cfg, weights, few)
        self._program = recorder.build(_native.Program(self.isa, self.threads, MAX_ROWS))
        self._pools = self.no_pools()

    def prepare(self, cfg: ModelConfig, threads: int | None, act_bits: int | None, kv_bits: int) -> None:
        """All that does not depend on weights. Raises UsageError as the constructor does."""
        if act_bits not in (None, 8, 16):
            raise UsageError(f"act_bits={act_bits!r} is not known.", "Use 8 or 16.")
        if kv_bits not in (4, 8, 16):
            raise UsageError(f"kv_bits={kv_bits!r} is not known.", "Use 4, 8 or 16.")
        try:
            self.isa = _native.isa()
        except RuntimeError as e:
            raise UsageError(*str(e).split("\n", 1)) from None
        self.cfg = cfg
        self._of_head: dict[str, Any] = {}
        self.predicts = cfg.further is not None
        # Every ISA has an exact 8-bit dot product and it is the fastest path, so it runs unless asked.
        self.act_bits = act_bits or 8
        self.kv_bits = kv_bits
        self.threads = threads or _native.cores()
        self.max_rows = MAX_ROWS

    def no_pools(self) -> list[_Pool]:
        """A pool for each memory, without blocks."""
        return [_Pool() for _ in self.memories]

    def describe(self) -> dict[str, Any]:
        """Facts of what runs: backend, isa, act_bits, kv_bits, threads."""
        return {
            "backend": self.name,
            "isa": self.isa,
            "act_bits": self.act_bits,
            "kv_bits": self.kv_bits,
            "threads": self.threads,
            **({"predicts": True, **self._of_head} if self.predicts else {}),
        }

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        """Layers of that memory, and KV heads of each."""
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block of BLOCK slots: keys and values of all layers of that memory; or of a state."""
        return block_bytes(self.memories[memory], self.kv_bits)

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a KV pool of so many blocks; memory is touched only as blocks are used."""
        size = max(1, n_blocks) * self.kv_bytes_per_block(memory)
        pool, blocks = self._pools[memory].map, self._pools[memory].blocks
        if grows := pool is not None and n_blocks > blocks:
            self._use_pool(memory, _Pool())  # nothing may point into it while the system moves it
        try:
            if pool is not None and grows:
                pool.resize(size)
            else:
                pool = _anonymous(size)
            blocks = n_blocks
        except (OSError, MemoryError) as e:
            raise MemoryBudgetError(
                f"The KV cache needs {size / 1e9:.1f} GB: {os.strerror(errno.ENOMEM)}.",
                "Ask for a smaller --ctx.",
            ) from e
        finally:
            if pool is not None:
                self._use_pool(memory, _Pool(pool, blocks))

    def _use_pool(self, memory: int, pool: _Pool) -> None:
        self._pools[memory] = pool
        if self.memories[memory].kind == "state":
            self._program.set_states(memory, pool.bytes, pool.blocks, self.memories[memory].state_bytes // 4)
        else:
            self._program.set_kv(memory, pool.bytes, pool.blocks, *self._shape(memory))

    def _shape(self, memory: int) -> tuple[int, int, int, int, int]:
        return _shape_of(self.memories[memory], self.kv_bits)

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        rows = self._pools[memory].rows()
        rows[dst] = rows[src]

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """Contents of the blocks: uint8 [n blocks, kv_bytes_per_block]."""
        return self._pools[memory].rows()[block_table]

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """Write what `read_blocks` gave into these blocks."""
        self._pools[memory].rows()[block_table] = data

    def move_slots(
        self,
        block_table: np.ndarray,
        src: np.ndarray,
        dst: np.ndarray,
        memory: int = 0,
        slots: int = 0,
        exact: np.ndarray | None = None,
        fresh: np.ndarray | None = None,
    ) -> None:
        """Keys and values of the logical slots `src` over those of `dst`."""
        arrays = (np.ascontiguousarray(a, np.int32) for a in (block_table, src, dst))
        self._program.move_slots(memory, *arrays, slots, _native_exact(exact))
        if fresh is not None:
            opened = (np.ascontiguousarray(a[fresh >= 0], np.int32) for a in (block_table, fresh))
            self._program.open_blocks(memory, *opened)

    def value_spread(
        self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> np.ndarray:
        """How far values lie from their weighted mean, float32 [layers, kv_heads, n]."""
        table = np.ascontiguousarray(block_table, np.int32)
        weights, out = np.ascontiguousarray(weights, np.float32), np.empty(weights.shape, np.float32)
        self._program.value_spread(memory, table, weights, out, _native_exact(exact))
        return out

    def turn_keys(
        self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> None:
        """Rotate the cached keys of the first slots by `delta` positions."""
        table = np.ascontiguousarray(block_table, np.int32)
        ropes = [self.cfg.all_layers[layer].attention.rope for layer in self.memories[memory].layers]
        for rope in {rope for rope in ropes if rope is not None}:
            here = np.array([r == rope for r in ropes])[:, None, None]  # zero turns nothing
            turned = np.ascontiguousarray(np.where(here, delta, 0), np.int32)
            frequencies = [float(f) for f in rope.frequencies()]
            self._program.turn_keys(memory, table, frequencies, turned, _native_exact(exact))

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [asked rows, vocab]."""
        rows, all_of_them = step.asked_rows, self._n_outputs
        ids = self._guessed if step.further else None
        n = (further.fewer(self.cfg) if step.few else 0) or (all_of_them if ids is None else len(ids))
        out = np.empty((rows, n), np.float32)
        self._run(step, out, None)
        return spread(out, all_of_them, ids)

    def step_greedy(self, step: Step) -> np.ndarray:
        """The argmax of each asked row (`Backend.step_greedy`); no logits are written."""
        out = np.empty(step.asked_rows, np.int32)
        self._run(step, None, out)
        return named(out, self._guessed) if step.further else out

    def free_memory(self) -> int:
        """Bytes that the machine can still give."""
        return machine.available_memory()

    def bandwidth(self) -> float:
        """GB/s of a plain read by as many threads."""
        return _native.read_bandwidth(self.threads, 1 << 29, 3)

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
        self._program = None
        self._pools = self.no_pools()

    def _run(self, step: Step, logits: np.ndarray | None, greedy: np.ndarray | None) -> None:
        if self._program is None:
            raise TinychatError("The model is closed.", "Load it again.")
        for pack in self._packs:
            pack.check_usable()
        spans = tuple([native_span(span) for span in step.spans])
        few = step.few and further.fewer(self.cfg) > 0
        self._program.run(spans, logits, greedy, step.further + (step.further and few))


def _parts(cfg: ModelConfig) -> tuple[bool, ...]:
    """The parts of a program that draft: of all ids, and of few, where these are fewer."""
    return () if cfg.further is None else (False, True) if further.fewer(cfg) else (False,)


def block_bytes(spec: MemorySpec, kv_bits: int) -> int:
    """Bytes of one block of BLOCK slots, all layers of that memory; or of a state."""
    return spec.state_bytes if spec.kind == "state" else _native.kv_block_bytes(*_shape_of(spec, kv_bits))


def _shape_of(spec: MemorySpec, kv_bits: int) -> tuple[int, int, int, int, int]:
    bits = 16 if spec.kind == "tail" else kv_bits
    return len(spec.layers), spec.kv_heads, spec.head_dim, bits, spec.latent


def _native_exact(exact: np.ndarray | None) -> np.ndarray:
    """Exact forms of blocks, as the program takes them."""
    return np.ascontiguousarray([] if exact is None else exact, np.int32)


def native_span(span: Span) -> tuple:
    """A span as the program takes it."""
    memories = [_native_memory(m) for m in span.memories]
    ids = np.ascontiguousarray(span.token_ids, np.int32)
    return ids, span.position, span.logits_from, tuple(memories)


def _native_memory(has: Slots | States | Tails) -> tuple:
    """What a span has in one memory, as the program takes it."""
    if isinstance(has, Tails):
        return np.ascontiguousarray(has.blocks, np.int32), 0, None, 0
    if isinstance(has, States):
        return np.ascontiguousarray(has.kept, np.int32), has.source, None, 0
    return np.ascontiguousarray(has.table, np.int32), has.length, has.scores, has.scored_rows
