"""What a model takes of a GPU, weighed before anything of it is there; and what stays in RAM where it is
more than there is.

Weighing is loading: the same loader and the same recorder, on a device that only counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from tinychat.backends.cuda_model import MAX_ROWS, assemble, shapes_of
from tinychat.backends.cuda_pack import EXPERT, KERNELS, Loader, Source, shape_of
from tinychat.backends.interface import MemorySpec
from tinychat.backends.plan import planned
from tinychat.base.errors import MemoryBudgetError
from tinychat.base.machine import human_bytes
from tinychat.kernels_cuda.driver import Memory
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ExpertsConfig, ModelConfig
from tinychat.network.family import outside
from tinychat.network.weight_policy import WeightPolicy

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LEAST = 16  # bytes of an allocation


class Ruler:
    """Stands for a device and its kernels: everything is given, nothing lies anywhere, all is counted."""

    overlaps = False

    def __init__(self) -> None:
        self.device: Any = self
        self.allocated = 0  # bytes of the device

    def allocate(self, size: int) -> Memory:
        """Device memory."""
        self.allocated += max(size, LEAST)
        return Memory(0, size)

    def shared(self, size: int) -> Memory:
        """Host memory."""
        return Memory(0, size)

    def pinned(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Host memory for results: not counted."""
        return np.broadcast_to(np.zeros((), dtype), tuple(shape))

    def upload(self, to: Memory, data: np.ndarray) -> None:
        """Nothing."""

    def kernel(self, source: str, name: str, defines: Any = None) -> None:
        """No kernel."""

    def prepare(self, units: Any) -> None:
        """Nothing is compiled."""


class Outline:
    """A pack that is not made yet: of its arrays there are the sizes. What follows from the numbers alone
    (fp32 scales that halves hold, orders of inputs) is taken for what it mostly is.
    """

    def __init__(self, checkpoint: Checkpoint, policy: WeightPolicy):
        self.index: dict[str, Any] = {"linears": {}}
        self._checkpoint, self._policy = checkpoint, policy
        cfg = checkpoint.config.without_further
        family = FAMILIES[cfg.family]
        vectors = {"model.norm": (cfg.hidden_size,), **outside(family, cfg)}
        for i in range(cfg.n_layers):
            vectors |= family.norms(cfg, i)
        self._vectors = {name: int(np.prod(shape)) for name, shape in vectors.items()}
        self._biases = family.biases(cfg)
        for name, w in planned(checkpoint, policy, KERNELS):
            self.index["linears"][name] = self._entry(name, w.runs, w.shape)

    def vector(self, name: str) -> np.ndarray:
        """float32 [n]."""
        return np.broadcast_to(np.float32(0), self._vectors[name])

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """One part, flat."""
        return np.broadcast_to(np.zeros((), dtype), at[1] // np.dtype(dtype).itemsize)

    def _entry(self, name: str, form: Any, shape: tuple[int, int]) -> dict[str, Any]:
        s = shape_of(form, *shape)
        codes, meta, zeros = ([0, n] if n else None for n in s.sizes)
        bias = [0, 4 * s.n] if name.endswith(self._biases) and self._biases else None
        parts = {"codes": codes, "meta": meta, "zeros": zeros, "bias": bias, "perm": None}
        return {**parts, "form": [*astuple(s.form), s.n, s.k, s.group]}


@dataclass(frozen=True)
class Division:
    """Which weights of a model lie where.

    away      linears that stay in RAM, by the first of the names under which they are asked for
    device    bytes of GPU memory without the cache: weights, and room to work in
    work      those of them that are no weights
    in_ram    bytes of weights in RAM
    reads     bytes that a token reads of the GPU's memory, and of RAM over the bus
    layers, experts  how many layers and experts have something in RAM
    spare     bytes to be kept free while weights are loaded: for work and the cache; what has no room beside
              them goes to RAM. None: that is an error
    """

    away: frozenset[str]
    device: int
    work: int
    in_ram: int
    reads: tuple[int, int]
    layers: int
    experts: int
    spare: int | None = None


class Scales:
    """Weighs one model. Has what `engine.memory.sizes` asks of a backend: sizes of its memories."""

    max_rows = MAX_ROWS

    def __init__(self, source: Source, cfg: ModelConfig, memories: tuple[MemorySpec, ...], kv_bits: int):
        self.source, self.cfg, self.memories, self.kv_bits = source, cfg, memories, kv_bits

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block of all layers."""
        return shapes_of(self.cfg, self.memories, self.kv_bits)[memory].block_bytes

    def weigh(self, away: frozenset[str] = frozenset(), spare: int = 0) -> Division:
        """The model with these linears in RAM; spare: bytes of its cache and of what comes and goes."""
        ruler: Any = Ruler()
        loader = Loader(self.source, ruler, away)
        assemble(loader, self.cfg, self.memories, self.kv_bits)
        self._sizes = loader.sizes
        reads = [0.0, 0.0]
        for name, size in loader.sizes.items():
            reads[name in away] += size * self._share(name)
        experts = {name.rpartition(".")[0] for name in away if EXPERT in name}
        linears = [name for name in away if name.startswith("model.layers.") and EXPERT not in name]
        layers = {name.split(".")[2] for name in linears}
        work = ruler.allocated - loader.on_device
        return Division(
            away, ruler.allocated, work, loader.in_ram, (round(reads[0]), round(reads[1])), len(layers),
            len(experts), work + spare,
        )  # fmt: skip

    def divide(self, room: int, spare: int = 0) -> Division:
        """The division that takes `room` bytes of the GPU beside the spare ones: first goes what a token
        reads least of, the last layers before the first ones. Raises MemoryBudgetError where nothing helps.
        """
        division = self.weigh(spare=spare)
        order = sorted(self._sizes, key=self._order)
        gone = 0
        while division.device > room:
            excess = division.device - room
            while excess > 0 and gone < len(order):
                excess -= self._sizes[order[gone]]
                gone += 1
            before, division = division, self.weigh(frozenset(order[:gone]), spare)
            if (gone == len(order) and division.device > room) or before == division:
                raise MemoryBudgetError(
                    f"With all weights in RAM this model still takes {human_bytes(division.device + spare)}"
                    f" of a GPU, and it may have {human_bytes(room + spare)}.",
                    "Use a larger --gpu-memory, a smaller --ctx, or --device cpu.",
                )
        return division

    def _share(self, name: str) -> float:
        """Part of a linear that a token reads."""
        if name == EMBEDDING and not self.cfg.tie_embeddings:
            return 0.0
        if EXPERT in name:
            mlp = self.cfg.layers[int(name.split(".")[2])].mlp
            assert isinstance(mlp, ExpertsConfig)
            return mlp.taken / mlp.n
        return 1.0

    def _order(self, name: str) -> tuple[float, int]:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        return self._share(name), -layer
