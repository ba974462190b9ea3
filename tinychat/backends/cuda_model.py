"""A model on a device: its weights, its memories, and its ops as a program. The device may be one that only
counts (`cuda_room`), so that what is said of a model before it is loaded is what loading it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tinychat.backends.cuda_pack import Loader
from tinychat.backends.cuda_recorder import Recorder
from tinychat.backends.cuda_recurrence import StatePool, StateShape, unit
from tinychat.backends.interface import MemorySpec
from tinychat.backends.split_ops import SplitOps, SplitSource
from tinychat.kernels_cuda.attention import Shape
from tinychat.kernels_cuda.pool import Pool
from tinychat.kernels_cuda.program import Program, program_sources
from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.network.recurrence import Recurrence

MAX_ROWS = 512
WORKSPACE = 64 << 20  # for attention's stretches: 16 rows of 32 heads at 16,000 tokens of context


def shapes_of(cfg: ModelConfig, memories: tuple[MemorySpec, ...], kv_bits: int) -> list[Shape | StateShape]:
    """Attention over each memory: its layers are alike, but for rope and window; or states."""
    return [
        StateShape(len(m.layers), m.state_bytes // 4 // len(m.layers))
        if m.kind == "state"
        else Shape(len(m.layers), cfg.layers[m.layers[0]].attention.n_heads, m.kv_heads, m.head_dim, kv_bits)
        for m in memories
    ]


def sources_of(cfg: ModelConfig, shapes: Sequence[Shape | StateShape]) -> list[tuple[str, dict[str, str]]]:
    """Sources of a model's kernels, apart from what its weights need."""
    mixers = [m for layer in cfg.layers for m in (layer.mixer, layer.beside)]
    states = [unit(m) for m in mixers if isinstance(m, Recurrence)]
    return program_sources([s for s in shapes if isinstance(s, Shape)]) + states


class Beside(Protocol):
    """What computes a part of a model beside the device: the CPU (`split.CpuPart`), or nothing
    (`cuda_room.Unrecorded`). weights and recorder: as a backend has them.
    """

    weights: Any
    recorder: Any

    def has(self, name: str) -> bool:
        """Whether a module, by its name, belongs to it."""
        ...

    def run(self, part: int) -> None:
        """Compute a part of what was recorded, for the present step."""
        ...

    def built(self, ops: SplitOps, program: Program) -> None:
        """All is recorded, and the device's program is built."""
        ...


def assemble(
    loader: Loader,
    cfg: ModelConfig,
    memories: tuple[MemorySpec, ...],
    kv_bits: int,
    beside: Beside | None = None,
) -> Program:
    """The model, loaded and recorded; its pools have no blocks yet. memories: the device's."""
    modules, family, shapes = loader.modules, FAMILIES[cfg.family], shapes_of(cfg, memories, kv_bits)
    source: Any = SplitSource(loader, beside.weights, beside.has) if beside else loader
    weights = family.load(source, cfg)
    loader.release()
    modules.prepare([*loader.sources, *sources_of(cfg, shapes)])
    workspace = modules.device.allocate(WORKSPACE)
    pools = [
        Pool(modules, s, workspace) if isinstance(s, Shape) else StatePool(modules.device, s) for s in shapes
    ]
    program = Program(modules, MAX_ROWS, pools)
    recorder = Recorder(program, memories)
    ops: Any = SplitOps(recorder, beside.recorder, beside.run) if beside else recorder
    family.forward(ops, cfg, weights)
    program.build()
    if beside:
        beside.built(ops, program)
    return program
