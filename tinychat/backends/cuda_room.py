"""What a model takes of a GPU, weighed before anything of it is there; and what stays in RAM where it is
more than there is.

Weighing is loading: the same loader and the same recorder, on a device that only counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from tinychat.backends import cuda_pack
from tinychat.backends.cuda_model import MAX_ROWS, assemble, shapes_of
from tinychat.backends.cuda_pack import EXPERT, KERNELS, Loader, Source, shape_of
from tinychat.backends.interface import MemorySpec
from tinychat.backends.plan import planned
from tinychat.base.errors import MemoryBudgetError
from tinychat.base.machine import human_bytes
from tinychat.kernels_cuda.driver import Memory
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import AttentionConfig, ExpertsConfig, ModelConfig
from tinychat.network.family import outside
from tinychat.network.weight_form import Form
from tinychat.network.weight_policy import WeightPolicy

EMBEDDING = "model.embed_tokens"
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
        for name, shape in vectors.items():  # gates among them are asked for as linears, in floats
            if len(shape) == 2:
                self.index["linears"][name] = _entry(Form(32, "fp32"), shape[0], shape[1], False)
        self._vectors = {name: int(np.prod(shape)) for name, shape in vectors.items()}
        self._biases = family.biases(cfg)
        for name, w in planned(checkpoint, policy, KERNELS):
            biased = bool(self._biases) and name.endswith(self._biases)
            self.index["linears"][name] = _entry(w.runs, *w.shape, biased)

    def vector(self, name: str) -> np.ndarray:
        """float32 [n]."""
        return np.broadcast_to(np.float32(0), self._vectors[name])

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """One part, flat."""
        return np.broadcast_to(np.zeros((), dtype), at[1] // np.dtype(dtype).itemsize)


@lru_cache(256)
def _entry(form: Form, n: int, k: int, biased: bool) -> dict[str, Any]:
    """Entry of a linear in a pack's index, of which nobody changes anything."""
    s = shape_of(form, n, k)
    codes, meta, zeros = ([0, size] if size else None for size in s.sizes)
    parts = {
        "codes": codes,
        "meta": meta,
        "zeros": zeros,
        "bias": [0, 4 * n] if biased else None,
        "perm": None,
    }
    return {**parts, "form": [*astuple(s.form), s.n, s.k, s.group]}


class Unrecorded:
    """Implements `cuda_model.Beside`, and `Ops` and loaders as far as it needs them, by doing nothing: a
    verb's result is the first thing that it was given.
    """

    def __init__(self, has: Callable[[str], bool]):
        self.has = has
        self.weights = self.recorder = self

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return lambda *given, **also: given[0] if given else None

    def split_heads(self, qkv: Any, attention: Any) -> tuple[Any, ...]:
        return qkv, qkv, qkv

    def gated_heads(self, qkv: Any, attention: Any) -> tuple[Any, ...]:
        return qkv, qkv, qkv, qkv

    def rope(self, q: Any, k: Any, rope: Any) -> tuple[Any, Any]:
        return q, k

    def norm_heads(self, q: Any, k: Any, *weights: Any) -> tuple[Any, Any]:
        return q, k


@dataclass(frozen=True)
class Division:
    """Which weights of a model lie where.

    away      linears that stay in RAM and are read over the bus, by the first of the names under which they
              are asked for
    layers    whole layers that the CPU computes
    mixtures  layers whose experts the CPU computes
    memories  those of the layers that the GPU computes
    device    bytes of GPU memory without the cache: weights, and room to work in
    work      those of them that are no weights
    in_ram    bytes of weights in RAM, read over the bus
    on_cpu    bytes of weights that the CPU computes with
    reads     bytes that a token reads of the GPU's memory, of RAM over the bus, and of RAM by the CPU
    spare     bytes to be kept free while weights are loaded: for work and the cache; what has no room beside
              them goes to RAM. None: that is an error
    """

    away: frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    mixtures: frozenset[int] = frozenset()
    memories: tuple[MemorySpec, ...] = ()
    device: int = 0
    work: int = 0
    in_ram: int = 0
    on_cpu: int = 0
    reads: tuple[int, int, int] = (0, 0, 0)
    spare: int | None = None

    def has_cpu(self, name: str) -> bool:
        """Whether the CPU computes with the module of that name."""
        layer = layer_of(name)
        expert = ".mlp." in name or name.endswith(".post_attention_layernorm")
        return layer in self.layers or (expert and layer in self.mixtures)


def layer_of(name: str) -> int:
    """The layer that a module is in; -1: none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def divisible(cfg: ModelConfig, memories: tuple[MemorySpec, ...]) -> bool:
    """Whether the CPU may compute a part: layers meet in one residual, and each has a memory of its own."""
    alone = all(a.source < 0 for a in cfg.attentions) and all(m.kind != "tail" for m in memories)
    return alone and cfg.streams == 1 and not cfg.layer_inputs


def without(memories: tuple[MemorySpec, ...], layers: frozenset[int]) -> tuple[MemorySpec, ...]:
    """What is left of the memories when these layers are elsewhere."""
    kept = ((m, tuple(i for i in m.layers if i not in layers)) for m in memories)
    return tuple(
        replace(m, layers=left, state_bytes=m.state_bytes // len(m.layers) * len(left))
        for m, left in kept
        if left
    )


@dataclass
class Scales:
    """Weighs one model.

    source    its weights in the layout of the GPU's kernels
    on_cpu    bytes of its linears in the layout of the CPU's, by their names
    cache     bytes that a GPU with such memories needs beside the model
    """

    source: Source
    cfg: ModelConfig
    memories: tuple[MemorySpec, ...]
    kv_bits: int
    on_cpu: Callable[[], Mapping[str, int]] = dict
    cache: Callable[[tuple[MemorySpec, ...]], int] = lambda memories: 0
    sizes: dict[str, int] = field(default_factory=dict)  # of linears, when it was weighed

    def weigh(self, plan: Division = Division()) -> Division:
        """The plan (what of it lies where) with all that follows from it."""
        ruler: Any = Ruler()
        loader = Loader(self.source, ruler, plan.away)
        memories = without(self.memories, plan.layers)
        beside = Unrecorded(plan.has_cpu) if plan.layers or plan.mixtures else None
        assemble(loader, self.cfg, memories, self.kv_bits, beside)
        self.sizes = {**self.sizes, **loader.sizes}
        reads = [0.0, 0.0, 0.0]
        for name, size in loader.sizes.items():
            reads[name in plan.away] += size * self._share(name)
        on_cpu = {name: n for name, n in self.on_cpu().items() if plan.has_cpu(name)} if beside else {}
        reads[2] = sum(size * self._share(name) for name, size in on_cpu.items())
        work = ruler.allocated - loader.on_device
        return replace(
            plan, memories=memories, device=ruler.allocated, work=work, in_ram=loader.in_ram,
            on_cpu=sum(on_cpu.values()), reads=(round(reads[0]), round(reads[1]), round(reads[2])),
            spare=work + self.cache(memories),
        )  # fmt: skip

    @cached_property
    def whole(self) -> Division:
        """The division of which nothing lies elsewhere."""
        return self.weigh()

    def divide(self, room: int, by_cpu: bool = False) -> Division:
        """The division that takes `room` bytes of the GPU, cache and all: first goes what a token reads least
        of, the last layers before the first ones. by_cpu: the CPU computes with what goes, else the GPU reads
        it over the bus.

        Raises MemoryBudgetError where nothing helps.
        """
        plan = self.whole
        steps = self._steps(by_cpu)
        while (excess := self._excess(plan, room)) > 0:
            excess += cuda_pack.PIECE  # which small weights share
            before = plan
            while excess > 0:
                step = next(steps, None)
                if step is None:
                    break
                plan, freed = step(plan)
                excess -= freed
            if plan is before:
                need, most = plan.device + self.cache(plan.memories), human_bytes(room)
                raise MemoryBudgetError(
                    f"With all weights in RAM this model takes {human_bytes(need)} of a GPU, and {most} may"
                    " be taken.",
                    "Use a larger --gpu-memory, a smaller --ctx, or --device cpu.",
                )
            plan = self.weigh(plan)
        return plan

    def _excess(self, plan: Division, room: int) -> int:
        return plan.device + self.cache(plan.memories) - room

    def _steps(self, by_cpu: bool) -> Iterator[Callable[[Division], tuple[Division, int]]]:
        """What can be moved, one after the other: a plan's change, and the bytes that it frees about."""
        last = range(self.cfg.n_layers - 1, -1, -1)
        order = sorted(self.sizes, key=self._order)
        if by_cpu:
            free = [name for name in order if not self._share(name)]
            yield from (partial(self._send, name) for name in free)
            mixtures = [i for i in last if isinstance(self.cfg.layers[i].mlp, ExpertsConfig)]
            yield from (partial(self._give, i, "mixtures") for i in mixtures)
            attends = (i for i in reversed(last) if isinstance(self.cfg.layers[i].mixer, AttentionConfig))
            stays = next(attends)  # the GPU has some keys and values at least
            yield from (partial(self._give, i, "layers") for i in last if i > stays)
        yield from (partial(self._send, name) for name in order)

    def _send(self, name: str, plan: Division) -> tuple[Division, int]:
        """One linear to RAM."""
        if name in plan.away or plan.has_cpu(name):
            return plan, 0
        return replace(plan, away=plan.away | {name}), self.sizes[name]

    def _give(self, layer: int, what: str, plan: Division) -> tuple[Division, int]:
        """A layer, or its experts, to the CPU."""
        after = replace(plan, **{what: getattr(plan, what) | {layer}})
        mine = [name for name in self.sizes if layer_of(name) == layer and name not in plan.away]
        return after, sum(self.sizes[n] for n in mine if after.has_cpu(n) and not plan.has_cpu(n))

    def _share(self, name: str) -> float:
        """Part of a linear that a token reads."""
        if name == EMBEDDING and not self.cfg.tie_embeddings:
            return 0.0
        if EXPERT in name:
            mlp = self.cfg.layers[layer_of(name)].mlp
            assert isinstance(mlp, ExpertsConfig)
            return mlp.taken / mlp.n
        return 1.0

    def _order(self, name: str) -> tuple[float, int]:
        return self._share(name), -layer_of(name)


@dataclass(frozen=True)
class Blocks:
    """Sizes of the memories of a model on a GPU: what `engine.memory.sizes` asks of a backend."""

    cfg: ModelConfig
    memories: tuple[MemorySpec, ...]
    kv_bits: int
    max_rows: int = MAX_ROWS

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes of one block of all layers."""
        return shapes_of(self.cfg, self.memories, self.kv_bits)[memory].block_bytes
