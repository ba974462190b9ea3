"""Resources that this process may use: memory and cores as affinity and cgroups allow them, not as the
hardware has them.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import psutil

HEADROOM = 300_000_000  # bytes left for everything that is neither weights nor KV
CGROUPS = Path("/sys/fs/cgroup")
CORES = Path("/sys/devices/system/cpu")
OWN_CGROUP = Path("/proc/self/cgroup")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None  # "max", or no such controller


def _cgroup_dirs() -> list[Path]:
    """This process's cgroup v2 folder and its parents; the tightest limit on the way up counts."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    relative = next((line[3:] for line in lines if line.startswith("0::")), "/")
    leaf = CGROUPS / relative.lstrip("/")
    return [d for d in (leaf, *leaf.parents) if d == CGROUPS or CGROUPS in d.parents]


def available_memory() -> int:
    """Bytes that can still be allocated: free memory, within the cgroup's limit and RLIMIT_AS."""
    free = psutil.virtual_memory().available
    for d in _cgroup_dirs():
        limit, used = _read_int(d / "memory.max"), _read_int(d / "memory.current")
        if limit is not None and used is not None:
            cached = 0
            try:
                stat = dict(line.split() for line in (d / "memory.stat").read_text().splitlines())
                cached = int(stat.get("inactive_file", 0))
            except (OSError, ValueError):
                pass
            free = min(free, max(0, limit - used + cached))
    v1 = CGROUPS / "memory"
    limit, used = _read_int(v1 / "memory.limit_in_bytes"), _read_int(v1 / "memory.usage_in_bytes")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free = min(free, max(0, soft - psutil.Process().memory_info().vms))
    return free


def total_memory() -> int:
    """Bytes that could ever be allocated: the machine's memory, or less where a limit says so."""
    limits = [_read_int(d / "memory.max") for d in _cgroup_dirs()]
    limits.append(_read_int(CGROUPS / "memory" / "memory.limit_in_bytes"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits.append(None if soft == resource.RLIM_INFINITY else soft)
    return min([psutil.virtual_memory().total, *(n for n in limits if n is not None)])


def has_gpu() -> bool:
    """Whether an NVIDIA GPU's device file is there: a card, a Jetson, or what WSL2 passes through."""
    files = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
    return any(Path(f).exists() for f in files)


def cpu_count() -> int:
    """Cores this process may use at once: affinity, and the cgroup's CPU quota rounded up. At least 1."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        n = os.cpu_count() or 1
    for d in _cgroup_dirs():
        try:
            limit, of = (d / "cpu.max").read_text().split()
            n = min(n, -(-int(limit) // int(of)))
        except (OSError, ValueError):
            continue
    v1 = CGROUPS / "cpu"
    quota, period = _read_int(v1 / "cpu.cfs_quota_us"), _read_int(v1 / "cpu.cfs_period_us")
    if quota is not None and period and quota > 0:  # -1: no limit
        n = min(n, -(-quota // period))
    return max(1, n)


def cache_bytes() -> int:
    """Bytes of the outermost caches that this process's cores have together; 0 where that is not known."""
    found: dict[str, tuple[int, int]] = {}  # by the cores that share it: level, bytes
    try:
        cores = os.sched_getaffinity(0)
        for cache in (c for core in cores for c in CORES.glob(f"cpu{core}/cache/index*")):
            size = (cache / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
            level = _read_int(cache / "level") or 0
            found[f"{level} {(cache / 'shared_cpu_list').read_text()}"] = level, int(size[:-1]) * unit
    except (OSError, ValueError, KeyError, IndexError, AttributeError):
        return 0
    outermost = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == outermost)


def peak_rss() -> int:
    """The most memory this program has held, in bytes."""
    try:  # getrusage would count what the process was before exec, which is its parent
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human_bytes(n: float) -> str:
    """4200000000 → '4.2 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_rate(rate: float | None) -> str:
    """An estimate of tokens a second: 9.53 → "≈ 9.5"; "?" while it is not known."""
    return "?" if rate is None else f"≈ {rate:.0f}" if rate >= 10 else f"≈ {rate:.1f}"
