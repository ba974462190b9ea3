"""The CUDA backend: a model's ops, recorded once as kernel launches; steps are CUDA graphs.

Nothing here imports torch, and nothing of CUDA is loaded before a device is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from tinychat.backends import pack_store
from tinychat.backends.cuda_device import free_memory, open_modules
from tinychat.backends.cuda_model import MAX_ROWS, Beside, assemble
from tinychat.backends.cuda_pack import CudaLayout, Loader, Source
from tinychat.backends.cuda_recorder import check
from tinychat.backends.cuda_room import Division
from tinychat.backends.interface import BLOCK, LargestLogits, MemorySpec, Slots, States, Step, memories_of
from tinychat.base.errors import (
    DeviceLostError,
    MemoryBudgetError,
    TinychatError,
    UnsupportedModelError,
    UsageError,
)
from tinychat.base.machine import human_bytes
from tinychat.kernels_cuda import experts, head
from tinychat.kernels_cuda.attention import MAX_HEAD
from tinychat.kernels_cuda.driver import DeviceError, Memory, OutOfMemoryError, PinnedMemoryError
from tinychat.kernels_cuda.inputs import Passing, Sequence
from tinychat.kernels_cuda.modules import Modules
from tinychat.kernels_cuda.pool import Pool
from tinychat.kernels_cuda.steps import Steps
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weight_policy import WeightPolicy


class CudaBackend:
    """Implements `Backend`. Rows do not depend on each other: any chunking gives the same bits."""

    name = "cuda"
    row_independent = True
    max_spans = MAX_ROWS
    predicts = False  # there are no kernels for the layer that predicts further
    survives_fork = False  # a GPU's context is lost in a fork

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        *,
        kv_bits: int = 16,
        modules: Modules | None = None,
        tell: Callable[[str], None] | None = None,
        pack: Source | None = None,
        division: Division | None = None,
        limit: int | None = None,
        beside: Beside | None = None,
    ):
        """modules: a device and its compiler, in place of this machine's. tell hears of what takes long.
        pack: that of the checkpoint, if it is open already. division: what stays in RAM; None: nothing, and
        what does not fit is an error. limit: bytes of the device that may be taken in all.
        beside: what computes the part of the model that the division leaves to the CPU.

        Raises UsageError for an unknown setting or where there is no usable GPU, MemoryBudgetError.
        """
        self.cfg: ModelConfig = checkpoint.config.without_further
        self.memories = refuse_unknown(checkpoint, kv_bits)
        if beside and division:
            self.memories = division.memories
        self.kv_bits = kv_bits
        self._modules = modules or open_modules()
        self._device = self._modules.device
        self.max_rows = MAX_ROWS
        self._steps: Steps | None = None
        with self._on_device():
            pack = pack or opened_pack(checkpoint, policy, tell)
            self._for_pools = limit - division.device if limit is not None and division else None
            loader = Loader(pack, self._modules, *((division.away, division.spare) if division else ()))
            self._steps = Steps(assemble(loader, self.cfg, self.memories, kv_bits, beside))
        self.in_ram = loader.in_ram

    def describe(self) -> dict[str, Any]:
        """Facts of what runs: backend, isa, act_bits, kv_bits, threads."""
        return {
            "backend": self.name,
            "isa": f"sm_{self._device.capability}",
            "act_bits": 16,
            "kv_bits": self.kv_bits,
            "threads": None,
            "gpu": self._device.name,
            **({"in_ram": self.in_ram} if self.in_ram else {}),
        }

    def free_memory(self) -> int:
        """Bytes that the device can still give."""
        with self._on_device():
            free = free_memory(self._device)
        if self._for_pools is None:
            return free
        taken = sum(p.blocks.size for p in self._steps.pools) if self._steps else 0
        return max(0, min(free, self._for_pools - taken))

    def bandwidth(self) -> float:
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
        return self._pool(memory).shape.block_bytes

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a KV pool of so many blocks, in device memory; if it grows, it is copied."""
        with self._on_device():
            self._open().resize(memory, n_blocks)

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        pool = self._pool(memory)
        with self._on_device():
            self._device.copy(pool.block(dst), pool.block(src))

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """Contents of the blocks: uint8 [n blocks, kv_bytes_per_block]."""
        pool, out = (
            self._pool(memory),
            np.empty((len(block_table), self.kv_bytes_per_block(memory)), np.uint8),
        )
        with self._on_device():
            for to, block in zip(out, block_table, strict=True):
                self._device.download(to, pool.block(int(block)))
            self._device.synchronize()
        return out

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """Write what `read_blocks` gave into these blocks."""
        pool = self._pool(memory)
        with self._on_device():
            for row, block in zip(data, block_table, strict=True):
                self._device.upload(pool.block(int(block)), np.ascontiguousarray(row))
            self._device.synchronize()

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
        pool = self._pool(memory)
        with self._on_device():
            table = self._open().table(block_table)
            a, b = (self._upload(np.ascontiguousarray(x, np.int32)) for x in (src, dst))
            pool.attention.move(pool.blocks, table, a, b, src.shape[2])
            self._device.synchronize()

    def value_spread(
        self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> np.ndarray:
        """How far each slot's value lies from the weighted mean: float32 [layers, kv_heads, n]."""
        pool, out = self._pool(memory), np.empty(weights.shape, np.float32)
        with self._on_device():
            table = self._open().table(block_table)
            w, to = self._upload(np.ascontiguousarray(weights, np.float32)), self._device.allocate(out.nbytes)
            pool.attention.value_spread(pool.blocks, table, w, to, weights.shape[2])
            self._device.download(out, to)
            self._device.synchronize()
        return out

    def turn_keys(
        self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> None:
        """Rotate the cached keys of the first slots by `delta` positions; blocks that a window has left
        behind may be -1.
        """
        pool = self._pool(memory)
        ropes = [self.cfg.layers[i].attention.rope for i in self.memories[memory].layers]
        with self._on_device():
            table = self._open().table(block_table)
            for rope in {rope for rope in ropes if rope is not None}:
                here = np.array([r == rope for r in ropes])[:, None, None]  # zero turns nothing
                turns = self._upload(np.ascontiguousarray(np.where(here, delta, 0), np.int32))
                f = rope.frequencies().astype(np.float64)
                pool.attention.turn(pool.blocks, table, turns, self._upload(f), delta.shape[2], len(f))
                self._device.synchronize()

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [asked rows, vocab], span after span."""
        return self._run(step, head.LOGITS)

    def step_greedy(self, step: Step) -> np.ndarray:
        """The argmax of each asked row, lowest id on a tie, or -1: int32 [asked rows]."""
        return self._run(step, head.ARGMAX)[:, 0]

    def step_largest(self, step: Step, temperature: float) -> list[LargestLogits]:
        """The largest logits of each asked row, of which there may be head.ROWS."""
        rows = self._run(step, head.TOP, 1 / temperature if temperature else 0.0)
        of = self._open().count

        def whole(row: int) -> np.ndarray:
            with self._on_device():
                steps = self._open()
                if steps.count != of:
                    raise RuntimeError("another step has written over these logits")
                return steps.logits(row)

        return [self._largest(row, partial(whole, i)) for i, row in enumerate(rows)]

    def _largest(self, row: np.ndarray, whole: Callable[[], np.ndarray]) -> LargestLogits:
        *_, n, total = row
        ids, values = row[:n].astype(np.int64), row[head.LARGEST :][:n].view(np.float32)
        return LargestLogits(ids, values, self.cfg.vocab_size, float(total.view(np.float32)), whole)

    def close(self) -> None:
        """Release memory. Idempotent."""
        self._steps = None

    def _run(self, step: Step, wanted: str, inverse_temperature: float = 0.0) -> np.ndarray:
        with self._on_device():
            steps = self._open()
            ids, positions, asked = self._rows(step)
            if wanted == head.TOP and len(asked) > head.ROWS:
                raise ValueError(f"the largest logits of {head.ROWS} rows are had, not of {len(asked)}")
            memories = [self._sequences(step, memory) for memory in range(len(self.memories))]
            columns = head.columns(wanted, self.cfg.vocab_size)
            out = np.empty((len(asked), columns), np.float32 if wanted == head.LOGITS else np.int32)
            steps.run(memories, ids, positions, asked, wanted, out, inverse_temperature)
        return out

    def _rows(self, step: Step) -> tuple[np.ndarray, list[int], list[int]]:
        """Ids and positions of the rows, and which of them get logits."""
        positions: list[int] = []
        asked: list[int] = []
        for span in step.spans:
            row, n = len(positions), len(span.token_ids)
            if n == 0 or not 0 <= span.logits_from <= n:
                raise ValueError(
                    f"a span has rows, and logits from one of them on: not {n}, {span.logits_from}"
                )
            if len(span.memories) != len(self.memories):
                raise ValueError("a span has something in each memory")
            positions += range(span.position, span.position + n)
            asked += range(row + span.logits_from, row + n)
        if not 1 <= len(positions) <= MAX_ROWS:
            raise ValueError(f"a step has 1 to {MAX_ROWS} rows, not {len(positions)}")
        all_ids = [span.token_ids for span in step.spans]
        ids = all_ids[0] if len(all_ids) == 1 else np.concatenate(all_ids)
        if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
            raise ValueError("a token id is outside the vocabulary")
        return ids, positions, asked

    def _sequences(self, step: Step, memory: int) -> list[Sequence | Passing]:
        """The rows as one memory has them. Of a window's table, what lies behind the window is left out."""
        spec, there = self.memories[memory], self._pool(memory).n_blocks
        sequences: list[Sequence | Passing] = []
        row = 0
        for span in step.spans:
            slots, n = span.memories[memory], len(span.token_ids)
            if isinstance(slots, States):
                named = np.append(slots.kept, slots.source)
                if len(named) != n + 1 or named.min() < -1 or named.max() >= there:
                    raise ValueError("a span's states are slots of the pool, or -1: one for each row")
                sequences.append(Passing(row, n, slots.source, slots.kept))
                row += n
                continue
            assert isinstance(slots, Slots)  # there are no tails here
            table = slots.table
            if slots.length < 0 or len(table) * BLOCK < slots.length + n:
                raise ValueError("the block table does not cover the step")
            skipped = max(0, slots.length + 1 - spec.window) // BLOCK if spec.kind == "window" else 0
            table = table[skipped:]
            if table.min() < 0 or table.max() >= there:
                raise ValueError("the block table names blocks that are not there")
            if slots.scores is not None and len(slots.scores) not in (1, slots.scored_rows):
                raise ValueError("scores are of each scored row, or of all together")
            if slots.scored_rows > n:
                raise ValueError(f"of {n} rows, {slots.scored_rows} cannot be scored")
            sequences.append(Sequence(row, n, slots.length, table, skipped, slots.scores, slots.scored_rows))
            row += n
        return sequences

    def _open(self) -> Steps:
        if self._steps is None:
            raise TinychatError("The model is closed.", "Load it again.")
        return self._steps

    def _pool(self, memory: int) -> Pool:
        return self._open().pools[memory]

    def _upload(self, a: np.ndarray) -> Memory:
        memory = self._device.allocate(a.nbytes)
        self._device.upload(memory, a)
        return memory

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Errors of the driver, in words."""
        try:
            self._device.enter()
            yield
        except DeviceError as e:
            raise self._in_words(e) from e

    def _in_words(self, e: DeviceError) -> TinychatError:
        name = self._device.name
        if isinstance(e, PinnedMemoryError):
            return MemoryBudgetError(
                f"The driver does not pin as much of RAM as {name} would have to read from there.",
                "Use a larger --gpu-memory, a smaller model, or --device cpu.",
            )
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


def opened_pack(
    checkpoint: Checkpoint, policy: WeightPolicy | None = None, tell: Callable[[str], None] | None = None
) -> Source:
    """The checkpoint's weights in the layout of these kernels."""
    family = FAMILIES[checkpoint.config.family]
    return pack_store.opened(checkpoint, policy or WeightPolicy(), family, CudaLayout(), tell, at_once=True)


def refuse_unknown(checkpoint: Checkpoint, kv_bits: int) -> tuple[MemorySpec, ...]:
    """The memories of a model that there are kernels for.

    Raises UnsupportedModelError for one that there are none for, UsageError for a cache that there is not.
    """
    if kv_bits == 4:
        raise UsageError(
            "The CUDA engine has no KV cache in 4 bits yet.", "Use --kv-bits 8, or --device cpu."
        )
    if kv_bits not in (8, 16):
        raise UsageError(f"kv_bits={kv_bits!r} is not known.", "Use 8 or 16.")
    cfg = checkpoint.config.without_further
    memories = memories_of(cfg)
    for spec in memories:
        _check_memory(spec, checkpoint.path.name)
    if cfg.n_experts > experts.MOST:
        raise UnsupportedModelError(
            f"{checkpoint.path.name} has {cfg.n_experts} experts in a layer; {experts.MOST} are the most.",
            "Use --device cpu.",
        )
    check(FAMILIES[cfg.family], cfg)
    return memories


def _check_memory(spec: MemorySpec, name: str) -> None:
    """Raises UnsupportedModelError for a memory that there are no kernels for."""
    if spec.head_dim > MAX_HEAD:
        raise UnsupportedModelError(
            f"{name} has heads of {spec.head_dim} channels; {MAX_HEAD} is the most.",
            "Use --device cpu.",
        )
