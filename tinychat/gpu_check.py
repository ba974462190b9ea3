"""The GPU's self-check: every kind of kernel that models need, over small weights and a small model, against
the CPU; then how fast memory is copied. It is the child of `backends/cuda_proof.py`, and may crash or hang.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from tinychat.backends import cuda_record
from tinychat.backends.cuda_record import Variant
from tinychat.backends.interface import BLOCK, Backend, Slots, Span, States, Step
from tinychat.base.errors import TinychatError
from tinychat.kernels_cuda import linear
from tinychat.kernels_cuda.modules import Modules
from tinychat.network.config import (
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.synthetic import FORMS, SyntheticCheckpoint, random_linear

CHECKED = ("gptq4", "q4_0", "q4_k", "q6_k", "q8_0", "mxfp4")  # forms of weights
ROWS = (1, 5, 16, 64, 200)
SHAPE = (272, 1024)  # of each: outputs and inputs
REPLAYS = 50
CLOSE = 0.02  # of the logits' deviation, for two ways of rounding activations

ATTENTION = AttentionConfig(4, 2, 64, RopeConfig(dim=64))
DENSE = DenseConfig(512)
MIXED: dict[str, tuple[str, Any, DenseConfig | ExpertsConfig]] = {
    "experts": ("mixtral", ATTENTION, ExpertsConfig(8, 2, 128)),
    "convolutions": ("lfm2", ConvConfig(256, 3), DENSE),
    "delta rules": ("qwen3_5", DeltaConfig(2, 4, 64, 64, 4), DENSE),
    "state spaces": ("granitemoehybrid", MambaConfig(4, 64, 64, 1, 4), DENSE),
}

Trial = tuple[str, Callable[[], None]]


class WrongError(Exception):
    """A trial's numbers are not what they should be."""


def main(arguments: list[str], opened: Callable[[Variant], Modules] | None = None) -> None:
    """The child: a line of JSON for each thing that happens."""
    variant = Variant(**json.loads(arguments[0]))
    try:
        modules = (opened or _open)(variant)
    except TinychatError as e:
        return _say(refused=[e.what, e.todo])
    device = modules.device
    _say(key=cuda_record.key_of(modules), facts={"gpu": device.name, "overlap": device.overlaps})
    with _own_home():
        for name, trial in trials(modules):
            _say(begin=name)
            began = time.perf_counter()
            try:
                trial()
            except Exception as e:  # whatever it is, it is what the trial came to
                _say(end={name: f"{type(e).__name__}: {e}"})
                break
            _say(end={name: round(time.perf_counter() - began, 3)})
    _say(done=True)


def _open(variant: Variant) -> Modules:
    from tinychat.backends.cuda_device import open_modules

    return open_modules(variant=variant)


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


@contextmanager
def _own_home() -> Iterator[None]:
    """Packs of small models are nothing to keep."""
    before = os.environ.get("TINYCHAT_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINYCHAT_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("TINYCHAT_HOME")
            if before is not None:
                os.environ["TINYCHAT_HOME"] = before


def trials(modules: Modules) -> Iterator[Trial]:
    """Each with its name, in the order in which they are to be run."""
    for form in CHECKED:
        yield f"linears of {form}", partial(_linears, modules, form)
    if not modules.device.integrated:
        yield "weights in RAM", partial(_in_ram, modules)
    for kv_bits in (16, 8):
        model = _Small(modules, kv_bits)
        for name in ("prefill", "rows", "graphs", "choice", "overlap", "eviction"):
            yield f"{name}, {kv_bits}-bit cache", getattr(model, name)
    for name in MIXED:
        yield name, partial(_mixed, modules, name)
    yield "bandwidth", partial(_bandwidth, modules)


def _linears(modules: Modules, form: str) -> None:
    """Products of 1 to 200 rows, and that no row's bits depend on how many there are."""
    from tinychat.backends.cuda_pack import pack
    from tinychat.network.weight_form import Form

    known = {**FORMS, "gptq4": Form(4, "unsigned", 128, "fp16", "zero")}
    (n, k), device = SHAPE, modules.device
    w = random_linear(known[form], n, k)
    x = np.random.default_rng(0).normal(size=(max(ROWS), k)).astype(np.float16)
    expected = x.astype(np.float64) @ w.dequantize().T.astype(np.float64)
    packed = linear.upload(modules, *pack(w))
    read, to = device.allocate(x.nbytes), device.allocate(4 * expected.size)
    device.upload(read, x)
    whole: np.ndarray | None = None
    for rows in reversed(ROWS):
        device.clear(to)
        linear.launch(modules, packed, read, to, rows, n)
        got = np.empty((rows, n), np.float32)
        device.download(got, to)
        device.synchronize()
        off = float(np.abs(got - expected[:rows]).max())
        if not off < 1e-3:
            raise WrongError(f"{rows} rows are off by {off:.3g}")
        whole = got if whole is None else whole
        if not np.array_equal(got, whole[:rows]):
            raise WrongError(f"{rows} rows have other bits than among {max(ROWS)}")


def _in_ram(modules: Modules) -> None:
    """Products with weights that are read over the bus have the bits of those with the same on the device."""
    from tinychat.backends.cuda_pack import pack

    (n, k), device = SHAPE, modules.device
    packed = pack(random_linear(FORMS["q4_k"], n, k))
    x = np.random.default_rng(0).normal(size=(max(ROWS), k)).astype(np.float16)
    near, far = (linear.upload(modules, *packed, take) for take in (device.allocate, device.shared))
    read, to = device.allocate(x.nbytes), device.allocate(4 * len(x) * n)
    device.upload(read, x)
    for rows in ROWS:
        got = np.empty((2, rows, n), np.float32)
        for w, out in zip((near, far), got, strict=True):
            device.clear(to)
            linear.launch(modules, w, read, to, rows, n)
            device.download(out, to)
            device.synchronize()
        if not np.array_equal(*got):
            raise WrongError(f"{rows} rows have other bits than with weights on the device")


class _Small:
    """A model of two layers on the GPU and on the CPU, made when the first trial needs it."""

    BLOCKS = 8
    TABLE = np.array([5, 2, 7, 0, 3, 6, 1, 4], np.int32)
    IDS = np.random.default_rng(1).integers(0, 512, BLOCKS * BLOCK).astype(np.int32)
    FILLED = 40

    def __init__(self, modules: Modules, kv_bits: int):
        self._modules, self._kv_bits = modules, kv_bits
        self._gpu: Any = None
        self._cpu: Any = None

    def _backends(self) -> tuple[Any, Any]:
        from tinychat.backends.cpu import CpuBackend
        from tinychat.backends.cuda import CudaBackend

        if self._gpu is None:
            checkpoint: Any = SyntheticCheckpoint(small_model())
            policy, bits = WeightPolicy(), self._kv_bits
            self._gpu = CudaBackend(checkpoint, policy, kv_bits=bits, modules=self._modules)
            self._cpu = CpuBackend(checkpoint, policy, kv_bits=bits, act_bits=16)
            for backend in (self._gpu, self._cpu):
                backend.allocate_kv(self.BLOCKS)
                self._fill(backend)
        return self._gpu, self._cpu

    def _step(self, backend: Backend, at: int, rows: int, logits: int | None = None) -> Step:
        asked = rows if logits is None else logits
        return Step.of(self.IDS[at : at + rows], at, at, self.TABLE, rows - asked)

    def _fill(self, backend: Backend) -> np.ndarray:
        return backend.step(self._step(backend, 0, self.FILLED))

    def prefill(self) -> None:
        """Forty rows at once."""
        gpu, cpu = self._backends()
        _near(self._fill(gpu), self._fill(cpu), "logits")

    def rows(self) -> None:
        """One row and five, the same bits in one step and in several."""
        gpu, cpu = self._backends()
        whole = gpu.step(self._step(gpu, self.FILLED, 11))
        _near(whole, cpu.step(self._step(cpu, self.FILLED, 11)), "logits")
        at, parts = self.FILLED, []
        for rows in (1, 5, 5):
            parts.append(gpu.step(self._step(gpu, at, rows)))
            at += rows
        _same(np.concatenate(parts), whole, "rows in several steps")

    def graphs(self) -> None:
        """Two steps of one row in turn, many times: by then one graph, with other inputs each time."""
        gpu, _ = self._backends()
        expected = gpu.step(self._step(gpu, self.FILLED, 2))
        for i in range(REPLAYS):
            step = self._step(gpu, self.FILLED + i % 2, 1)
            _same(gpu.step(step), expected[i % 2 :][:1], "a step that is repeated")

    def choice(self) -> None:
        """The largest logits, as they come back."""
        gpu, _ = self._backends()
        step = self._step(gpu, self.FILLED, 5)
        logits = gpu.step(step)
        _same(gpu.step_greedy(step), logits.argmax(axis=1), "argmax")
        for row, found in zip(logits, gpu.step_largest(step, 0.7), strict=True):
            order = np.lexsort((np.arange(len(row)), -row))[: len(found.ids)]
            _same(found.ids, order, "the largest logits")

    def overlap(self) -> None:
        """Kernels one after the other have the same bits as kernels that overlap."""
        gpu, _ = self._backends()
        device = self._modules.device
        expected = gpu.step(self._step(gpu, self.FILLED, 20))
        overlaps, device.overlaps = device.overlaps, False
        try:
            _same(gpu.step(self._step(gpu, self.FILLED, 20)), expected, "kernels one after the other")
        finally:
            device.overlaps = overlaps

    def eviction(self) -> None:
        """Scores, distances of values, slots that move, keys that turn."""
        results = []
        for backend in self._backends():
            self._fill(backend)
            scores = np.zeros((1, 2, 2, self.FILLED + 8), np.float32)
            at = self.FILLED
            backend.step(Step.of(self.IDS[at : at + 8], at, at, self.TABLE, 8, scores, 4))
            weights = np.ones((2, 2, at), np.float32)
            spread = backend.value_spread(self.TABLE, weights)
            src, dst = (np.tile(np.arange(i, i + 4, dtype=np.int32), (2, 2, 1)) for i in (30, 3))
            backend.move_slots(self.TABLE, src, dst)
            backend.turn_keys(self.TABLE, np.full((2, 2, 30), -7, np.int32))
            after = backend.step(Step.of(self.IDS[:3], 30, 30, self.TABLE, 0))
            results.append((scores, spread, after))
        names = "scores", "distances of values", "logits after eviction"
        for what, got, expected in zip(names, *results, strict=True):
            _near(got, expected, what)


def _mixed(modules: Modules, name: str) -> None:
    """A model with such a layer in front of a usual one: forty rows as on the CPU, and one, five and one more
    with the bits that they have in one step. States are read, left, and gone on from.
    """
    from tinychat.backends.cpu import CpuBackend
    from tinychat.backends.cuda import CudaBackend

    family, mixer, mlp = MIXED[name]
    checkpoint: Any = SyntheticCheckpoint(small_model(family, mixer, mlp))
    gpu = CudaBackend(checkpoint, WeightPolicy(), modules=modules)
    cpu = CpuBackend(checkpoint, WeightPolicy(), act_bits=16)

    def step(backend: Any, at: int, rows: int, source: int, kept: int) -> np.ndarray:
        passed = np.full(rows, -1, np.int32)
        passed[-1] = kept
        memories = tuple(
            States(source, passed) if spec.kind == "state" else Slots(_Small.TABLE, at)
            for spec in backend.memories
        )
        return backend.step(Step((Span(_Small.IDS[at : at + rows], at, 0, memories),)))

    for backend in (gpu, cpu):
        for memory in range(len(backend.memories)):
            backend.allocate_kv(_Small.BLOCKS, memory)
    _near(step(gpu, 0, 40, -1, 3), step(cpu, 0, 40, -1, 3), "logits")
    whole = step(gpu, 40, 7, 3, 4)
    _near(whole, step(cpu, 40, 7, 3, 4), "logits behind a state")
    parts = [step(gpu, 40, 1, 3, 5), step(gpu, 41, 5, 5, 5), step(gpu, 46, 1, 5, 6)]
    _same(np.concatenate(parts), whole, "rows in several steps")


def small_model(
    family: str = "llama", mixer: Any = ATTENTION, mlp: DenseConfig | ExpertsConfig = DENSE
) -> ModelConfig:
    """Two layers, 256 wide: one with this mixer, and one of four heads."""
    return ModelConfig(
        family=family,
        hidden_size=256,
        layers=(LayerConfig(mixer, mlp), LayerConfig(ATTENTION, mlp)),
        vocab_size=512,
        context_length=256,
        tie_embeddings=True,
    )


def _near(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    off = float(np.sqrt(np.mean((got - expected) ** 2)) / np.std(expected))
    if not off < CLOSE:
        raise WrongError(f"{what} are off by {off:.3g} of their deviation")


def _same(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(got, expected):
        raise WrongError(f"{what}: other bits")


def _bandwidth(modules: Modules) -> None:
    """GB/s of a copy, bytes read and written; said, not judged."""
    device = modules.device
    size = min(256 << 20, device.memory()[0] // 4)
    a, b = device.allocate(size), device.allocate(size)
    best = max(2 * size / device.seconds(partial(device.copy, a, b)) for _ in range(5))
    _say(facts={"bandwidth_gb_s": round(best / 1e9, 1)})


if __name__ == "__main__":
    main(sys.argv[1:])
