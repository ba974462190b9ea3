"""Whether a model fits this machine, and how: what would lie on the GPU, in RAM, and how fast that is. Known
before it is loaded; loading asks here too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tinychat.backends.cuda_pack import EXPERT
from tinychat.backends.cuda_room import EMBEDDING, Blocks, Division, Outline, Scales, divisible, layer_of
from tinychat.backends.interface import MemorySpec, memories_of, with_tails
from tinychat.backends.plan import plan, planned, too_large
from tinychat.base.errors import MemoryBudgetError, TinychatError
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import HEADROOM, available_memory, human_bytes
from tinychat.engine.memory.sizes import memory_bytes, tokens_within
from tinychat.hub.fits import read_bandwidth
from tinychat.model import DEFAULT_CTX
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_policy import WeightPolicy

BUS = 25.0  # GB/s of PCIe 4.0
CROSSING = 30e-6  # seconds that rows take to the CPU and back, beside what is computed there: an estimate
LEAST_CTX = 2048  # tokens that a context which nobody asked for has, before weights make room for it


@dataclass(frozen=True)
class Gpu:
    """A GPU as it is now, or as one supposes it. free: bytes; shares: its memory is the CPU's too, so nothing
    is won by leaving weights there. copies, bus: GB/s within it and to it; None: not known.
    """

    name: str
    free: int
    shares: bool = False
    copies: float | None = None
    bus: float | None = None

    @classmethod
    def of(cls, device: Any) -> Gpu:
        """A device that is open (`kernels_cuda.driver.Device`)."""
        from tinychat.backends.cuda_device import free_memory

        return cls(device.name, free_memory(device), device.integrated)

    def measured(self, device: Any) -> Gpu:
        """The same with its bandwidths, which takes some hundredths of a second."""
        from tinychat.backends.cuda_device import rates

        copies, bus = rates(device)
        return replace(self, copies=copies, bus=bus)

    def assumed(self) -> Gpu:
        """With usual bandwidths where they are not known: a GPU's, and PCIe 4.0's."""
        return replace(self, copies=self.copies or 20 * BUS, bus=self.bus or BUS)

    def limit(self, gpu_memory: float | str) -> int:
        """Bytes that a model may take. Raises MemoryBudgetError for more than are free."""
        if isinstance(gpu_memory, str):
            return self.free
        if (asked := round(gpu_memory * 1e9)) > self.free:
            most = int(self.free / 1e8) / 10
            todo = f"Use --gpu-memory {most:g} or less" if most else "Use --device cpu"
            raise MemoryBudgetError(
                f"--gpu-memory asks for {human_bytes(asked)}; of {self.name}'s {human_bytes(self.free)} are"
                " free.",
                f"{todo}, or close other programs on the GPU.",
            )
        return asked


@dataclass(frozen=True)
class OnCpu:
    """A model on the CPU alone: bytes of its weights and of the cache that it would have, those that are
    free, tokens a second. tokens: the longest context that there is room for, of those that are wanted;
    least: what it must have.
    """

    weights: int
    cache: int
    free: int
    rate: float | None
    tokens: int
    least: int

    @property
    def fits(self) -> bool:
        """Whether there is room for both."""
        return self.tokens >= self.least


@dataclass
class _Cache:
    """What `engine.memory.sizes` asks of a backend, of the CPU's."""

    memories: tuple[MemorySpec, ...]
    bits: int
    max_rows: int = 512

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        from tinychat.backends.cpu import block_bytes

        return block_bytes(self.memories[memory], self.bits)


class Fitting:
    """One model with the options of its loading."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy,
        options: LoadOptions,
        memories: tuple[MemorySpec, ...] = (),
        measure: Callable[[Gpu], Gpu] = lambda gpu: gpu,
    ):
        """memories: those that a GPU would have; none: it does not run there. measure: finds out its
        bandwidths, where they are asked for.
        """
        self.measure = measure
        self.checkpoint, self.policy, self.options, self.memories = checkpoint, policy, options, memories
        self.cfg = checkpoint.config.without_further
        self.ctx = options.ctx or min(self.cfg.context_length, DEFAULT_CTX)
        self.least = options.ctx or min(self.ctx, LEAST_CTX)

    @cached_property
    def _outline(self) -> Outline:
        return Outline(self.checkpoint, self.policy)

    @cached_property
    def _on_cpu(self) -> dict[str, int]:
        from tinychat.backends.cpu_pack import KERNELS

        return {name: w.runs_bytes for name, w in planned(self.checkpoint, self.policy, KERNELS)}

    @cached_property
    def ram(self) -> float | None:
        """GB/s at which all cores read RAM; None: not known."""
        return read_bandwidth()

    def scales(self, pack: Any = None) -> Scales:
        """What weighs the model on a GPU. pack: its weights as they are stored; None: as they will be."""
        source = pack or self._outline
        return Scales(
            source, self.cfg, self.memories, self.options.kv_bits, lambda: self._on_cpu,
            lambda memories: self.cache(self.ctx, memories),
        )  # fmt: skip

    def cache(self, ctx: int, memories: tuple[MemorySpec, ...] | None = None) -> int:
        """Bytes of a GPU's memory for a context of so many tokens, and to work in. memories: those of the
        layers that it computes.
        """
        blocks: Any = Blocks(self.cfg, self.memories if memories is None else memories, self.options.kv_bits)
        return memory_bytes(blocks, ctx) + HEADROOM

    def division(self, gpu: Gpu, pack: Any = None, likely: Division | None = None) -> Division:
        """What lies where on that GPU. A context that nobody asked for is shortened before weights leave.
        likely: a division that was made without the pack; it is taken where it fits.

        Raises MemoryBudgetError where it does not fit.
        """
        limit, scales = gpu.limit(self.options.gpu_memory), self.scales(pack)
        if likely and elsewhere(likely):
            again = scales.weigh(likely)
            if again.device + self.cache(self.ctx, again.memories) <= limit:
                return again
        whole = scales.whole
        least = self.cache(self.least)
        if whole.device + least <= limit:
            return replace(whole, spare=None if gpu.shares else whole.work + least)
        free = f"{self.checkpoint.path.name} needs {human_bytes(whole.device + least)} of"
        free += f" {gpu.name}'s memory, and {human_bytes(limit)} are free"
        if gpu.shares:
            raise MemoryBudgetError(f"{free}.", too_large(self.checkpoint))
        try:
            read = scales.divide(limit)
        except MemoryBudgetError as e:
            raise MemoryBudgetError(f"{free}, too little for what cannot lie in RAM.", e.todo) from None
        ways, gpu = [read], self.measure(gpu).assumed()
        if divisible(self.cfg, self.memories):
            with suppress(NotImplementedError):  # something would have to cross that does not
                ways.append(scales.divide(limit, by_cpu=True))
        return min(ways, key=lambda d: self._seconds(d, gpu))

    def _seconds(self, d: Division, gpu: Gpu) -> float:
        """Seconds of a token, by bandwidths that are known or assumed."""
        stretches = len(d.mixtures - d.layers) + bool(d.layers)
        speeds = (gpu.copies, gpu.bus, self.ram or BUS)
        return sum(n / s / 1e9 for n, s in zip(d.reads, speeds, strict=True) if s) + stretches * CROSSING

    def rate(self, division: Division, gpu: Gpu) -> float | None:
        """Tokens a second at the beginning of a context, by the bytes of a token and all bandwidths."""
        speeds = (gpu.copies, gpu.bus, self.ram)
        unknown = any(n and not s for n, s in zip(division.reads, speeds, strict=True))
        return None if unknown else 1 / self._seconds(division, gpu)

    def on_cpu(self, kv_bits: int | None = None, policy: WeightPolicy | None = None) -> OnCpu:
        """The model on the CPU alone."""
        from tinychat.backends.cpu_pack import KERNELS

        weights = read = 0.0
        for w in plan(self.checkpoint, policy or self.policy, KERNELS):
            weights += w.runs_bytes
            read += w.runs_bytes * w.share
        memories: Any = self._cpu_cache(kv_bits or self.options.kv_bits)
        free, cache = available_memory(), memory_bytes(memories, self.ctx)
        tokens = min(self.ctx, tokens_within(memories, free - round(weights) - HEADROOM, self.ctx))
        bandwidth = self.ram if policy is None and kv_bits is None else None
        rate = bandwidth * 1e9 / read if bandwidth else None
        return OnCpu(round(weights), cache, free, rate, tokens, self.least)

    def _cpu_cache(self, bits: int) -> _Cache:
        memories = memories_of(self.cfg)
        return _Cache(with_tails(memories) if bits == 4 else memories, bits)

    def advice(self, cpu: OnCpu) -> list[str]:
        """What would fit where this does not: each line is true when it is followed."""
        out = []
        if 256 <= cpu.tokens < cpu.least:
            out.append(f"--ctx {cpu.tokens}: a shorter context")
        for bits in (8, 4):
            latent = any(m.latent for m in memories_of(self.cfg))
            if bits < self.options.kv_bits and not latent and self.on_cpu(bits).fits:
                out.append(f"--kv-bits {bits}: the cache in {bits} bits")
                break
        small = self.on_cpu(policy=WeightPolicy("rtn", 8))
        if self.policy.quantize == "auto" and small.weights < cpu.weights and small.fits:
            out.append(f"--quantize rtn: weights in 4 bits, {human_bytes(small.weights)}")
        return out or [self._smaller_file(cpu)]

    def _smaller_file(self, cpu: OnCpu) -> str:
        """A file with fewer bits, where one could fit; else a smaller model."""
        from tinychat.hub.facts import parameters

        n, room = parameters(self.cfg), cpu.free - cpu.cache - HEADROOM
        for words, bits in (("Q4_K_M", 4.9), ("Q2_K", 3.0)):
            if n * bits / 8 <= room and n * bits / 8 < 0.9 * cpu.weights:
                return f"a file of it in about {bits:.0f} bits ({words}): {human_bytes(n * bits / 8)}"
        if room < 1e8:
            return "nothing, before other programs give memory back"
        return f"a model of {human_bytes(room)} or less: tinychat list --available"


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def elsewhere(division: Division) -> int:
    """Bytes of weights that do not lie on the GPU."""
    return division.in_ram + division.on_cpu


def check_ram(checkpoint: Checkpoint, division: Division) -> None:
    """Raises MemoryBudgetError where RAM has no room for what the GPU leaves there."""
    free = available_memory()
    need = elsewhere(division)
    if need + HEADROOM > free:
        raise MemoryBudgetError(
            f"{human_bytes(need)} of {checkpoint.path.name} do not fit the GPU, and of RAM"
            f" {human_bytes(free)} are free.",
            too_large(checkpoint),
        )


def away(division: Division) -> str:
    """What stays in RAM, in words."""
    experts = {name.rpartition(".")[0] for name in division.away if EXPERT in name}
    layers = {layer_of(name) for name in division.away if EXPERT not in name} - {-1}
    read = ["the embedding"] if EMBEDDING in division.away else []
    read += [_many(len(experts), "expert")] if experts else []
    read += [f"linears of {_many(len(layers), 'layer')}"] if layers else []
    mixtures = len(division.mixtures - division.layers)
    computed = [f"the experts of {_many(mixtures, 'layer')}"] if mixtures else []
    computed += [_many(len(division.layers), "layer")] if division.layers else []
    ways = [f"read over the bus: {', '.join(read or ['the head'])}"] if division.away else []
    ways += [f"computed by the CPU: {', '.join(computed)}"] if computed else []
    size = human_bytes(elsewhere(division))
    return f"{size} of the weights stay in RAM ({'; '.join(ways)})"


def here() -> Gpu | None:
    """This machine's GPU, if there is one that can be opened."""
    from tinychat.backends import cuda_device

    try:
        device = cuda_device.Device()
    except (cuda_device.DeviceMissingError, cuda_device.DeviceError):
        return None
    try:
        return Gpu.of(device).measured(device)
    except cuda_device.DeviceError:
        return None


def supposed(options: LoadOptions, gpu: Gpu | None) -> Gpu | None:
    """The machine's GPU; where there is none and memory is named, one of which nothing else is known."""
    if gpu is None and not isinstance(options.gpu_memory, str):
        return Gpu("a GPU", round(options.gpu_memory * 1e9))
    return gpu


def facts(checkpoint: Checkpoint, options: LoadOptions, gpu: Gpu | None) -> dict[str, Any]:
    """Facts of `tinychat show --fit`, in bytes and tokens a second.

    gpu    what lies on it and in RAM beside it, or why it does not run there; None: there is no GPU
    cpu    what the CPU alone would take
    takes  "gpu", "gpu and ram", "cpu" or None: what runs it
    advice what would fit, where nothing does
    """
    from tinychat.backends.cuda import refuse_unknown

    policy = WeightPolicy(options.quantize, options.head_bits)
    how = Fitting(checkpoint, policy, options)
    cpu = how.on_cpu()
    on_gpu: dict[str, Any] | None = None
    takes = "cpu" if cpu.fits else None
    if gpu is not None:
        on_gpu = {"name": gpu.name, "free": gpu.free}
        try:
            how.memories = refuse_unknown(checkpoint, options.kv_bits)
            division = how.division(gpu)
            moved = elsewhere(division)
            if moved:
                check_ram(checkpoint, division)
            rate = how.rate(division, gpu)
            on_gpu |= {
                "limit": gpu.limit(options.gpu_memory),
                "weights": division.device - division.work,
                "work": division.work,
                "cache": how.cache(how.ctx, division.memories) - HEADROOM,
                "in_ram": moved,
                "away": away(division) if moved else None,
                "tokens_per_s": rate and round(rate, 1),
            }
            slower = moved and rate and cpu.rate and rate < cpu.rate and cpu.fits
            takes = "cpu" if slower else "gpu and ram" if moved else "gpu"
        except TinychatError as e:
            on_gpu["why_not"] = e.what
    return {
        "context": how.ctx,
        "kv_bits": options.kv_bits,
        "gpu": on_gpu,
        "cpu": {
            "free": cpu.free,
            "weights": cpu.weights,
            "cache": cpu.cache,
            "fits": cpu.fits,
            "tokens_per_s": cpu.rate and round(cpu.rate, 1),
        },
        "takes": takes,
        "advice": [] if takes else how.advice(cpu),
    }
