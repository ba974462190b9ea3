"""What models ask of this machine, known before anything of them is downloaded (memory, disk, tokens a
second), and which of them to begin with. Nothing here uses the network.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tinychat.base import locations
from tinychat.base.machine import HEADROOM, available_memory, cache_bytes, cpu_count, human_bytes
from tinychat.hub import store
from tinychat.hub.aliases import ALIASES, Alias, all_aliases
from tinychat.hub.reach import begun

DEMO = "smollm2-135m"
OVERHEAD = 1.15  # memory that a model takes beside its weights: a context, tables, activations
UNPACKED = 1.02  # disk that a download takes
USABLE = 5.0  # tokens a second below which reading along is no pleasure
COMFORTABLE = 8.0  # tokens a second that a first model should make
FIRST_DOWNLOAD = 6e9  # bytes that a first model should have at most
FIRST_SHARE = 0.6  # of the free memory that it should take at most: other programs need some
STEP = 0.6  # size of the next model to begin with, at most, of the one before it
OFFERED = 3
MEASURED = 64 << 20  # bytes that are read to measure the memory; more where the caches are larger
MOST_MEASURED = 256 << 20
ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """Bytes of memory and disk that are free, and GB/s that all cores read from memory together (None: not
    measured).
    """

    memory: int
    disk: int
    bandwidth: float | None = None

    @classmethod
    def here(cls, bandwidth: float | None = None) -> Machine:
        """This machine as it is now."""
        folder = locations.models_dir().absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        disk = 0
        with suppress(OSError):
            disk = shutil.disk_usage(folder).free
        return cls(available_memory(), disk, bandwidth)


@dataclass(frozen=True)
class Fit:
    """A model beside the machine. size: bytes of the download, or of what is here; 0: not known.

    memory: bytes that it takes while it runs. rate: tokens a second by the memory's bandwidth, an estimate;
    None: not known. why_not: why it does not fit; empty: it does. held: bytes of its download that are here.
    """

    name: str
    size: int
    memory: int
    rate: float | None
    why_not: str = ""
    good_for: str = ""
    license: str = ""
    held: int = 0

    @property
    def demo(self) -> bool:
        """Whether it only shows how the program works."""
        return self.name == DEMO

    def as_dict(self) -> dict[str, Any]:
        """Form in which it leaves the process."""
        return {**asdict(self), "demo": self.demo}


def read_bandwidth() -> float | None:
    """GB/s that all cores read, measured in some hundredths of a second; None where it cannot be."""
    try:
        from tinychat.kernels_cpu import _native

        size = min(MOST_MEASURED, max(MEASURED, 2 * cache_bytes()))
        return float(_native.read_bandwidth(cpu_count(), size, ROUNDS))
    except (ImportError, AttributeError, RuntimeError, MemoryError):  # doctor says which
        return None


def memory_of(size: int) -> int:
    """Bytes that a model of that many takes while it runs."""
    return int(size * OVERHEAD) + HEADROOM


def fit_of(name: str, size: int, machine: Machine, here: bool = False) -> Fit:
    """A model by its name and its bytes beside the machine. here: nothing has to be downloaded."""
    alias = ALIASES.get(name) or Alias((), 0, license="")
    if size <= 0:
        return Fit(name, 0, 0, None)
    need, held, why = memory_of(size), 0 if here else begun(name), ""
    if need > machine.memory:
        why = f"more than {human_bytes(machine.memory)} memory"
    elif not here and size * UNPACKED - held > machine.disk:
        why = f"more than {human_bytes(machine.disk)} disk"
    rate = machine.bandwidth * 1e9 / (size * alias.read) if machine.bandwidth else None
    return Fit(name, size, need, rate, why, alias.good_for, alias.license, held)


def available(machine: Machine) -> list[Fit]:
    """Models that can be pulled and are not here, the smallest first."""
    have = {m.name for m in store.installed()}
    fits = [fit_of(n, a.size, machine) for n, a in all_aliases().items() if n not in have]
    return sorted(fits, key=lambda f: f.size)


def offer(fits: list[Fit], machine: Machine) -> list[Fit]:
    """Models to begin with, the best first, and the demo behind them.

    The best is the largest that is quick enough to be read along, leaves other programs some memory and comes
    in minutes; each of the others is a good deal smaller and quicker. Where none is quick the smallest come.
    """
    real = sorted((f for f in fits if f.size and not f.why_not and not f.demo), key=lambda f: -f.size)
    small = [f for f in real if f.size <= FIRST_DOWNLOAD and f.memory <= FIRST_SHARE * machine.memory]
    quick = [f for f in small if f.rate is None or f.rate >= COMFORTABLE]
    chosen: list[Fit] = []
    for f in quick:
        if len(chosen) < OFFERED and (not chosen or f.size <= STEP * chosen[-1].size):
            chosen.append(f)
    for f in reversed(real):  # the smallest of those that are left
        if len(chosen) < OFFERED and f not in chosen:
            chosen.append(f)
    chosen.sort(key=lambda f: (0, -f.size) if f in quick else (1, f.size))
    return [*chosen, *(f for f in fits if f.demo and not f.why_not)]
