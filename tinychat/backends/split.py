"""A model on two devices: a backend of two, whose programs have the layers, or the experts, of each.

Every memory is one for the engine: a block is a block of both, of which each has the part of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinychat.backends import pack_store
from tinychat.backends.cpu import MAX_ROWS, CpuBackend, native_span
from tinychat.backends.cpu_pack import CpuLayout, CpuWeights
from tinychat.backends.cpu_recorder import Recorder
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.cuda_pack import Source
from tinychat.backends.cuda_room import Division, without
from tinychat.backends.interface import LargestLogits, MemorySpec, Slots, Span, Step, memories_of
from tinychat.backends.split_ops import SplitOps
from tinychat.base.errors import TinychatError
from tinychat.kernels_cpu import _native
from tinychat.kernels_cuda.modules import Modules
from tinychat.kernels_cuda.program import Program
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_policy import WeightPolicy

Tell = Callable[[str], None]


class CpuPart(CpuBackend):
    """Implements `Beside`: some layers of a model, or the experts of some, run a part at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy,
        division: Division,
        threads: int | None = None,
        act_bits: int | None = None,
        kv_bits: int = 16,
        tell: Tell | None = None,
    ):
        """act_bits: 16 unless it is said, as near to the GPU's halves as its kernels come."""
        self.prepare(checkpoint.config.without_further, threads, act_bits or 16, kv_bits)
        self.has = division.has_cpu
        elsewhere = frozenset(range(self.cfg.n_layers)) - division.layers
        self.memories = without(memories_of(self.cfg), elsewhere)
        self._pools = self.no_pools()
        layout, family = CpuLayout(self.threads), FAMILIES[self.cfg.family]
        self._packs = [pack_store.opened(checkpoint, policy, family, layout, tell)]
        self.weights = CpuWeights(self._packs[0])
        self.recorder = Recorder(self.memories, self.act_bits)
        self.spans: tuple[Any, ...] = ()  # of the present step, as the program takes them

    def built(self, ops: SplitOps, program: Program) -> None:
        """The rows that cross have their place."""
        self._program = self.recorder.build(_native.Program(self.isa, self.threads, MAX_ROWS))
        ops.build(program, self._program)

    def run(self, part: int) -> None:
        """Compute a part of the program for the step that `spans` tells of."""
        if self._program is None:
            raise TinychatError("The model is closed.", "Load it again.")
        for pack in self._packs:
            pack.check_usable()
        self._program.run(self.spans, None, None, part)


@dataclass(frozen=True)
class Share:
    """What one of the backends has of a memory. memory: its index there; layers: which ones of the whole."""

    backend: CudaBackend | CpuPart
    memory: int
    layers: np.ndarray

    @property
    def on_gpu(self) -> bool:
        """Whether it is the GPU's."""
        return isinstance(self.backend, CudaBackend)


class SplitBackend:
    """Implements `Backend`, as CudaBackend does."""

    name = "cuda"
    row_independent = True
    max_rows = max_spans = MAX_ROWS
    predicts = False
    survives_fork = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy,
        division: Division,
        *,
        modules: Modules,
        pack: Source | None = None,
        kv_bits: int = 16,
        threads: int | None = None,
        act_bits: int | None = None,
        limit: int | None = None,
        tell: Tell | None = None,
    ):
        """Raises as both backends do."""
        self.memories = memories_of(checkpoint.config.without_further)
        self.cpu = CpuPart(checkpoint, policy, division, threads, act_bits, kv_bits, tell)
        self.gpu = CudaBackend(
            checkpoint, policy, kv_bits=kv_bits, modules=modules, tell=tell, pack=pack, division=division,
            limit=limit, beside=self.cpu,
        )  # fmt: skip
        self._division, self.in_ram = division, self.gpu.in_ram + division.on_cpu
        self._shares = [list(self._shares_of(spec)) for spec in self.memories]

    def _shares_of(self, spec: MemorySpec) -> Iterator[Share]:
        for backend in (self.gpu, self.cpu):
            for i, own in enumerate(backend.memories):
                alike = replace(own, layers=spec.layers, state_bytes=spec.state_bytes) == spec
                if alike and set(own.layers) <= set(spec.layers):
                    yield Share(backend, i, np.array([spec.layers.index(layer) for layer in own.layers]))

    def describe(self) -> dict[str, Any]:
        """Facts of what runs, of both."""
        where = {"layers": sorted(self._division.layers), "experts": sorted(self._division.mixtures)}
        cpu = {**where, "act_bits": self.cpu.act_bits}
        return {**self.gpu.describe(), "in_ram": self.in_ram, "threads": self.cpu.threads, "beside": cpu}

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        """Layers of that memory, and KV heads of each."""
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block, of both."""
        return sum(self._block_bytes(memory))

    def _block_bytes(self, memory: int) -> list[int]:
        return [s.backend.kv_bytes_per_block(s.memory) for s in self._shares[memory]]

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a pool of so many blocks, on both. If the second one has no room, the first has blocks that
        nobody uses.
        """
        for s in self._shares[memory]:
            s.backend.allocate_kv(n_blocks, s.memory)

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block."""
        for s in self._shares[memory]:
            s.backend.copy_block(src, dst, s.memory)

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """Contents of the blocks: the GPU's part of each, then the CPU's."""
        parts = [s.backend.read_blocks(block_table, s.memory) for s in self._shares[memory]]
        return np.concatenate(parts, axis=1)

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """Write what `read_blocks` gave into these blocks."""
        at = 0
        for s, size in zip(self._shares[memory], self._block_bytes(memory), strict=True):
            s.backend.write_blocks(block_table, data[:, at : at + size], s.memory)
            at += size

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
        for s in self._shares[memory]:
            s.backend.move_slots(block_table, src[s.layers], dst[s.layers], s.memory, slots, exact, fresh)

    def value_spread(
        self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> np.ndarray:
        """How far each slot's value lies from the weighted mean: float32 [layers, kv_heads, n]."""
        out = np.empty(weights.shape, np.float32)
        for s in self._shares[memory]:
            out[s.layers] = s.backend.value_spread(block_table, weights[s.layers], s.memory, exact)
        return out

    def turn_keys(
        self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> None:
        """Rotate the cached keys of the first slots by `delta` positions."""
        for s in self._shares[memory]:
            s.backend.turn_keys(block_table, delta[s.layers], s.memory, exact)

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [asked rows, vocab], span after span."""
        return self._run(step, self.gpu.step)

    def step_greedy(self, step: Step) -> np.ndarray:
        """The argmax of each asked row, lowest id on a tie, or -1: int32 [asked rows]."""
        return self._run(step, self.gpu.step_greedy)

    def step_largest(self, step: Step, temperature: float) -> list[LargestLogits]:
        """The largest logits of each asked row."""
        return self._run(step, lambda own: self.gpu.step_largest(own, temperature))

    def free_memory(self) -> int:
        """Bytes that can still be had for memories, of which each device gives its part."""
        whole = [self.kv_bytes_per_block(m) for m in range(len(self.memories))]
        free = []
        for backend in (self.gpu, self.cpu):
            own = sum(backend.kv_bytes_per_block(m) for m in range(len(backend.memories)))
            if own:
                free.append(int(backend.free_memory() * (sum(whole) / own)))
        return min(free)

    def bandwidth(self) -> float:
        """GB/s of a plain copy within the GPU, bytes read and written."""
        return self.gpu.bandwidth()

    def close(self) -> None:
        """Release memory and threads. Idempotent."""
        self.gpu.close()
        self.cpu.close()

    def _run(self, step: Step, run: Callable[[Step], Any]) -> Any:
        """A step of the GPU's program, which runs the CPU's parts on its way."""
        scored: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # the whole, which layers, their own
        spans = [self._divided(span, scored) for span in step.spans]
        self.cpu.spans = tuple(native_span(cpu) for _, cpu in spans)
        result = run(replace(step, spans=tuple(gpu for gpu, _ in spans)))
        for whole, layers, own in scored:
            whole[:, layers] = own
        return result

    def _divided(
        self, span: Span, scored: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> tuple[Span, Span]:
        """The span as each of them has it. Of the CPU nobody asks logits."""
        memories: dict[bool, list[Any]] = {True: [], False: []}
        for shares, has in zip(self._shares, span.memories, strict=True):
            for s in shares:
                own = has
                if isinstance(has, Slots) and has.scores is not None and len(shares) > 1:
                    own = replace(has, scores=np.ascontiguousarray(has.scores[:, s.layers]))
                    scored.append((has.scores, s.layers, own.scores))  # type: ignore[arg-type]
                memories[s.on_gpu].append(own)
        gpu = replace(span, memories=tuple(memories[True]))
        return gpu, replace(span, memories=tuple(memories[False]), logits_from=len(span.token_ids))
