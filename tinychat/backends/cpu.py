"""The CPU backend: a model's ops, recorded once (`cpu_recorder`), replayed each step; and its KV cache.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tinychat.backends import pack_store
from tinychat.backends.cpu_pack import CpuLayout, CpuWeights
from tinychat.backends.cpu_recorder import Recorder
from tinychat.backends.interface import Span, Step, memories_of
from tinychat.base.errors import MemoryBudgetError, TinychatError, UsageError
from tinychat.kernels_cpu import _native
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
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
    max_spans = 1
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
        layout = CpuLayout(self.threads)
        self._pack = pack_store.opened(checkpoint, policy or WeightPolicy(), family, layout, tell)
        weights = family.load(CpuWeights(self._pack), self.cfg)
        recorder = Recorder(self.act_bits)
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
        ropes = [layer.mixer.rope for layer in self.cfg.layers]
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
