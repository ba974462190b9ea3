"""What the processor's cores are: threads of one core, fast and slow ones, and how much of them is ours."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tinychat.base import machine

DEVICES = Path("/sys/devices")
HYBRID = 0.8  # of the fastest core's capacity: cores below are of a slower kind


@dataclass(frozen=True)
class Cores:
    """What this process may use.

    threads    that run at once: what computes by default
    logical    that the affinity allows; more than `threads` where a cgroup gives less time
    physical   cores that these are; None where that is not known. Two threads of one share its units
    fast       logical ones of the fast kind on a processor that has two kinds; None if all are alike
    """

    threads: int
    logical: int
    physical: int | None = None
    fast: int | None = None

    def candidates(self) -> list[int]:
        """Numbers of threads that may be the best, ascending."""
        counts = {n for n in (self.threads, self.physical, self.fast) if n}
        if self.physical and self.fast:  # one thread for each fast core: slow cores have one thread each
            doubled = self.logical - self.physical
            counts.add(self.fast - doubled)
        if self.threads > 4 or not self.physical:  # memory's bandwidth is often reached by half of them
            counts.add(self.threads // 2)
        return sorted(n for n in counts if 0 < n <= self.threads)

    def sentence(self) -> str:
        """What they are, in words."""
        doubled = self.physical and self.physical < self.logical
        said = f"{self.physical} with {self.logical} threads" if doubled else f"{self.logical}"
        if self.fast:
            said += (
                f", {self.fast} of the threads on fast cores" if doubled else f", {self.fast} of them fast"
            )
        if self.threads < self.logical:
            said += f"; a cgroup gives the time of {self.threads}"
        return said


def cores() -> Cores:
    """The cores of this machine that this process may use."""
    if sys.platform == "darwin":
        fast, slow = _sysctl("hw.perflevel0.logicalcpu"), _sysctl("hw.perflevel1.logicalcpu")
        logical = os.cpu_count() or 1
        return Cores(machine.cpu_count(), logical, _sysctl("hw.physicalcpu"), fast if fast and slow else None)
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(machine.cpu_count(), len(allowed), _physical(allowed), _fast(allowed))


def _physical(allowed: list[int]) -> int | None:
    try:
        return len({(machine.CORES / f"cpu{n}/topology/thread_siblings_list").read_text() for n in allowed})
    except OSError:
        return None


def _fast(allowed: list[int]) -> int | None:
    """How many are of the fast kind, where there is a slow one."""
    try:  # Intel's hybrids say it
        slow = _listed((DEVICES / "cpu_atom/cpus").read_text())
        fast = [n for n in allowed if n not in slow]
    except (OSError, ValueError):
        try:  # ARM says how much work each does, others how fast their clocks may be
            speeds = {n: _speed(n) for n in allowed}
        except (OSError, ValueError):
            return None
        fast = [n for n in allowed if speeds[n] >= HYBRID * max(speeds.values())]
    return len(fast) if 0 < len(fast) < len(allowed) else None


def _speed(n: int) -> int:
    try:
        return int((machine.CORES / f"cpu{n}/cpu_capacity").read_text())
    except OSError:
        return int((machine.CORES / f"cpu{n}/cpufreq/cpuinfo_max_freq").read_text())


def _listed(text: str) -> set[int]:
    """A list as the kernel writes it, such as "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _sysctl(name: str) -> int | None:
    """A number that macOS tells of itself."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    try:
        library = ctypes.CDLL(None)
        failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return None
    return value.value if not failed and value.value > 0 else None
