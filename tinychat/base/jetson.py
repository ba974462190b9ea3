"""Facts about a Jetson and how it is set: module, Jetson Linux (L4T) and JetPack, power mode, GPU clock."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

JETPACKS = {35: 5, 36: 6, 38: 7, 39: 7}  # by the first number of L4T
OLDEST = 36  # CUDA 12


def report(root: Path = Path("/")) -> dict[str, Any]:
    """Facts and "problems"; nothing at all where there is no Jetson."""
    release = _read(root / "etc/nv_tegra_release")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if not found:
        return {}
    major = int(found[1])
    facts: dict[str, Any] = {
        "jetson": _read(root / "proc/device-tree/model").strip("\0\n ") or "unknown module",
        "l4t": f"R{major}.{found[2]}" + (f" (JetPack {JETPACKS[major]})" if major in JETPACKS else ""),
    }
    problems = []
    if major < OLDEST:
        problems.append("JetPack 5 has CUDA 11, and 12 is needed: install JetPack 6 or newer.")
    mode = power_mode()
    if mode:
        facts["power_mode"] = mode
        if "MAXN" not in mode.upper():
            problems.append(f"The power mode {mode} holds memory and GPU back: sudo nvpmodel -m 0")
    for folder in sorted((root / "sys/class/devfreq").glob("*gpu*")):
        low, now, high = (_read(folder / f"{name}_freq").strip() for name in ("min", "cur", "max"))
        if low.isdigit() and now.isdigit() and high.isdigit():
            pinned = "pinned" if low == high else "rises on demand; sudo jetson_clocks pins it"
            facts["gpu_clock"] = f"{int(now) // 10**6} of {int(high) // 10**6} MHz, {pinned}"
    return {**facts, "problems": problems}


def power_mode() -> str | None:
    """Name of the mode by `nvpmodel -q`, or None."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"Power Mode: *(.+)", done.stdout)
    return found[1].strip() if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
