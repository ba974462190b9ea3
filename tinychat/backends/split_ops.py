"""Ops of a model that is computed in two places: each verb is recorded where its weight lies, and what it
reads crosses from the other place.

A stretch of verbs on the CPU is a part of the CPU's program, which the GPU's program runs between two of its
stages. What crosses is fp32 rows of the residual, down before such a part and up behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from tinychat.backends import cpu_values, cuda_recorder
from tinychat.kernels_cuda.inputs import Size
from tinychat.kernels_cuda.program import Buffer, Program
from tinychat.network.family import WeightSource
from tinychat.network.ops import DeltaWeights, MambaWeights

GPU, CPU = "gpu", "cpu"


@dataclass(eq=False)
class Placed:
    """A handle of either recorder, or one and its copy; or a weight, which has one place for good."""

    values: dict[str, Any]
    weight: bool = False

    def there(self, place: str, cross: Callable[[Any, str], Any]) -> Any:
        """The handle of that place."""
        if place not in self.values:
            if self.weight:
                raise NotImplementedError("a weight does not cross")
            ((_, value),) = self.values.items()
            self.values[place] = cross(value, place)
        return self.values[place]


class SplitSource:
    """Gives each weight by the loader of the place where it belongs. on_cpu: the names of the CPU's."""

    def __init__(self, gpu: WeightSource, cpu: WeightSource, on_cpu: Callable[[str], bool]):
        self._sources, self._on_cpu = {GPU: gpu, CPU: cpu}, on_cpu

    def __getattr__(self, kind: str) -> Callable[..., Placed]:
        def load(*names: str) -> Placed:
            place = CPU if self._on_cpu(names[0]) else GPU
            return Placed({place: getattr(self._sources[place], kind)(*names)}, weight=True)

        return load

    def head(self, name: str, tied_to: Placed) -> Placed:
        """The output head: always the GPU's, where tokens are chosen."""
        return Placed({GPU: self._sources[GPU].head(name, tied_to=tied_to.values[GPU])}, weight=True)


@dataclass
class Crossing:
    """Rows that cross: a buffer of the GPU's program, and one of the CPU's.

    which   of those of one part; -1: it goes up
    halves  they are halves on the GPU, in rows with padding, and floats on the CPU
    """

    gpu: Buffer
    cpu: cpu_values.Buffer
    cols: int
    which: int
    halves: bool = False
    host: np.ndarray | None = None  # pinned
    array: np.ndarray | None = None  # the CPU's buffer

    def rows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Both sides of it on the host: pinned, and the CPU's."""
        assert self.host is not None
        assert self.array is not None
        return self.host[:n], self.array[:n]

    def meet(self, program: Program, native: Any, host: np.ndarray | None = None) -> None:
        """Both buffers have memory now. host: pinned rows that are there for such a crossing."""
        floats = self.cpu.native.floats if self.cpu.rows else self.cpu.native
        kind = np.float16 if self.halves else np.float32
        cols = self.gpu.row_bytes // np.dtype(kind).itemsize
        self.array = native.array(floats)
        self.host = program.device.pinned((program.max_rows, cols), kind) if host is None else host


@dataclass
class SplitOps:
    """Implements `Ops`. run: computes a part of the CPU's program for the present step."""

    gpu: cuda_recorder.Recorder
    cpu: Any
    run: Callable[[int], None]
    parts: int = 0  # of the CPU's program
    crossings: list[Crossing] = field(default_factory=list)
    _down: list[Crossing] = field(default_factory=list)  # into the part that is open
    _open: bool = False
    _begun: bool = False  # whether it has verbs

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb.startswith("_"):
            raise AttributeError(verb)

        def record(*given: Any, **also: Any) -> Any:
            place = _place((*given, *also.values()))
            recorder = self.cpu if place == CPU else self.gpu

            def here(x: Any) -> Any:
                if isinstance(x, list):
                    return [here(each) for each in x]
                if isinstance(x, (DeltaWeights, MambaWeights)):
                    return replace(x, **{f.name: here(getattr(x, f.name)) for f in fields(x)})
                return x.there(place, self._cross) if isinstance(x, Placed) else x

            given, also = tuple(map(here, given)), {name: here(x) for name, x in also.items()}
            if place == CPU:
                self._begin()
                self._begun = True
            return _placed(getattr(recorder, verb)(*given, **also), place)

        return record

    def _begin(self) -> None:
        """Have a part of the CPU's program open."""
        if not self._open:
            if self.parts:
                self.cpu.next_part()
            self.parts += 1
            self._open, self._begun = True, False

    def _cross(self, value: Any, place: str) -> Any:
        if place == CPU and self._begun:
            self._close(None)  # what was recorded comes before
        crossing = self._crossing(value, place)
        self.crossings.append(crossing)
        if place == CPU:
            self._begin()
            self.cpu.hold(crossing.cpu)
            self._down.append(crossing)
            to = {"rows": crossing.cpu, "changed": True} if crossing.halves else {"floats": crossing.cpu}
            return cpu_values.Value(crossing.cols, **to)
        self.cpu.hold(crossing.cpu)
        self._close(crossing)
        return cuda_recorder.Value(crossing.cols, floats=crossing.gpu)

    def _crossing(self, value: Any, place: str) -> Crossing:
        if not isinstance(value, (cuda_recorder.Value, cpu_values.Value)):
            raise NotImplementedError("heads and routes do not cross")
        if isinstance(value, cuda_recorder.Value):
            if value.each != 1:
                raise NotImplementedError("what experts give does not cross")
            halves = value.floats is None
            to = cpu_values.Buffer(value.cols, rows=halves, as_float=halves)
            source = value.halves if value.floats is None else value.floats
            assert source is not None  # a value has one or the other
            return Crossing(source, to, value.cols, len(self._down), halves)
        return Crossing(self.gpu.program.floats(value.cols), self.cpu.as_floats(value), value.cols, -1)

    def _close(self, up: Crossing | None) -> None:
        """The part that is open ends here: the host runs it. up: what it leaves for the GPU."""
        part = self.parts - 1 if self._open else None
        down, device = self._down, self.gpu.program.device
        self._down, self._open, self._begun = [], False, False

        def work(z: Size) -> None:
            for c in down:
                device.download(c.rows(z.rows)[0], c.gpu.memory)
            device.synchronize()
            for c in down:
                host, array = c.rows(z.rows)
                array[:] = host[:, : c.cols]
            if part is not None:
                self.run(part)
            if up is not None:
                host, array = up.rows(z.rows)
                host[:] = array
                device.upload(up.gpu.memory, host)

        uses = [c.gpu for c in (*down, *([up] if up else []))]
        self.gpu.program.host(uses, work)

    def build(self, program: Program, native: Any) -> None:
        """Both programs are built: where rows cross is known. Crossings of a kind share their pinned rows."""
        kinds: dict[tuple[int, int, bool], Crossing] = {}
        for c in self.crossings:
            c.meet(program, native, kinds.setdefault((c.cols, c.which, c.halves), c).host)


def _place(given: tuple[Any, ...]) -> str:
    """Place of the weight among these handles; without one, that of the first handle."""
    flat = [x for each in given for x in (each if isinstance(each, list) else [each])]
    placed = [x for x in flat if isinstance(x, Placed)]
    chosen = next((x for x in placed if x.weight), placed[0])
    return next(iter(chosen.values)) if chosen.weight else list(chosen.values)[-1]


def _placed(result: Any, place: str) -> Any:
    if isinstance(result, tuple):
        return tuple(None if r is None else Placed({place: r}) for r in result)
    return None if result is None else Placed({place: result})
