"""This machine's GPU and its compiler, opened; what is missing said in two lines."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tinychat import locations
from tinychat.errors import TinychatError, UsageError
from tinychat.kernels_cuda.driver import Device, DeviceError, DeviceMissingError
from tinychat.kernels_cuda.modules import Cache, Modules
from tinychat.kernels_cuda.nvrtc import CompileError, CompilerMissingError, Nvrtc


@lru_cache(maxsize=1)
def open_modules() -> Modules:
    """One device a process. Raises UsageError if there is none, or no compiler for it."""
    try:
        device = Device()
    except DeviceMissingError as e:
        raise UsageError(
            str(e), "Use --device cpu, or install a driver that nvidia-smi is happy with."
        ) from None
    except DeviceError as e:
        raise TinychatError(
            f"The GPU cannot be used ({e}).", "Use --device cpu; nvidia-smi may say more."
        ) from e
    return Modules(device, _cache(device))


def _cache(device: Device) -> Cache:
    try:
        compiler = Nvrtc()
        compiler.target(device.capability)
    except (CompilerMissingError, CompileError) as e:
        raise UsageError(
            f"{device.name} is there, but its kernels cannot be compiled: {e}",
            "pip install nvidia-cuda-nvrtc-cu12, or use --device cpu.",
        ) from None
    return Cache(locations.kernels_dir(), compiler)


def report() -> dict[str, Any]:
    """What `tinychat doctor` says of it; "gpu_problem" where something is missing."""
    facts: dict[str, Any] = {}
    try:
        device = Device()
    except (DeviceMissingError, DeviceError) as e:
        return {"gpu": f"none: {e}"}
    free, total = device.memory()
    facts["gpu"] = f"{device.name}, sm_{device.capability}, {device.processors} processors"
    facts["gpu_driver"] = "CUDA {}.{}".format(*device.driver_version)
    facts["gpu_memory_free"] = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB"
    try:
        compiler = Nvrtc()
        facts["gpu_compiler"] = f"{compiler.name}, {compiler.target(device.capability)}"
    except (CompilerMissingError, CompileError) as e:
        facts["gpu_problem"] = f"{e} pip install nvidia-cuda-nvrtc-cu12; until then the CPU is used."
    kept = locations.kernels_dir()
    facts["gpu_kernels"] = f"{len(list(kept.glob('*.kernel')))} compiled in {kept}"
    return facts
