"""This machine's GPU and its compiler, opened and tried; what is missing said in two lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinychat.backends import cuda_record
from tinychat.base import locations, machine
from tinychat.base.errors import DeviceLostError, TinychatError, UsageError
from tinychat.kernels_cuda import linear
from tinychat.kernels_cuda.driver import (
    LIBRARY,
    Device,
    DeviceError,
    DeviceMissingError,
    LostError,
    RefusedError,
)
from tinychat.kernels_cuda.modules import Cache, Modules
from tinychat.kernels_cuda.nvrtc import CompileError, CompilerMissingError, compilers

INSTALL = "pip install nvidia-cuda-nvrtc-cu12"


_opened: dict[str, Modules] = {}


def open_modules(
    library: str = LIBRARY,
    tell: Callable[[str], None] | None = None,
    variant: cuda_record.Variant | None = None,
) -> Modules:
    """One device a process. tell: hears that kernels have to be compiled, which takes a while. variant: how
    they are run, in place of what the self-check has found out.

    Raises UsageError if there is none that works, or no compiler for it.
    """
    if library not in _opened:
        _opened[library] = _open(library, tell, variant)
    if error := _opened[library].device.lost:
        raise DeviceLostError(
            f"{_opened[library].device.name} failed earlier in this process ({error}).",
            "Start again; if it happens again, use --device cpu.",
        )
    _opened[library].tell = tell
    return _opened[library]


def _open(library: str, tell: Callable[[str], None] | None, variant: cuda_record.Variant | None) -> Modules:
    try:
        device = Device(library)
    except DeviceMissingError as e:
        raise UsageError(
            str(e), "Use --device cpu, or install a driver with which nvidia-smi shows the GPU."
        ) from None
    except DeviceError as e:
        raise TinychatError(
            f"The GPU cannot be used ({e}).", "Use --device cpu; nvidia-smi may say more."
        ) from e
    try:
        return _compiled(device, tell, variant)
    except (CompilerMissingError, CompileError) as e:
        raise UsageError(
            f"The kernels for {device.name} cannot be compiled: {e}", f"{INSTALL}, or use --device cpu."
        ) from None
    except DeviceError as e:
        raise TinychatError(f"The kernels do not run on {device.name} ({e}).", "Use --device cpu.") from e


def _compiled(
    device: Device, tell: Callable[[str], None] | None, variant: cuda_record.Variant | None = None
) -> Modules:
    """The device with the best compiler whose kernels the driver takes."""
    refused: RefusedError | None = None
    for compiler in compilers(device.driver_version):
        modules = Modules(device, Cache(locations.kernels_dir(), compiler), tell)
        (variant or cuda_record.variant_for(modules)).apply(modules)
        try:
            check(modules)
        except RefusedError as e:
            refused = e
            continue
        return modules
    assert refused is not None  # without a compiler there was an error
    raise refused


def check(modules: Modules) -> None:
    """Small products, computed and compared, so that a GPU, a driver or a compiler that is wrong in the
    basics is not found out by its answers. Raises TinychatError.

    Where only overlapping kernels fail, they are left out.
    """
    device = modules.device
    if device.overlaps:
        try:
            if _computes(modules):
                return
        except (LostError, RefusedError):
            raise
        except DeviceError:
            pass
        device.overlaps = False
    if not _computes(modules):
        raise TinychatError(
            f"{device.name} computes something else than it should.",
            "Use --device cpu, and report this with the output of tinychat doctor.",
        )


def _computes(modules: Modules) -> bool:
    """A product and the same added to it, at once and from a graph."""
    from tinychat.backends.cuda_pack import pack
    from tinychat.network.weights import quantize_int8

    rng = np.random.default_rng(0)
    device, rows, n, k = modules.device, 3, 48, 320
    w = quantize_int8(rng.normal(size=(n, k)).astype(np.float32))
    x = rng.normal(size=(rows, k)).astype(np.float16)
    expected = 2 * x.astype(np.float64) @ w.dequantize().T.astype(np.float64)
    read, to = device.allocate(x.nbytes), device.allocate(4 * rows * n)
    device.upload(read, x)
    packed = linear.upload(modules, *pack(w))

    def products() -> None:
        for add in (False, True):
            linear.launch(modules, packed, read, to, rows, n, add)

    def right() -> bool:
        got = np.empty((rows, n), np.float32)
        device.download(got, to)
        device.synchronize()
        return bool(np.abs(got - expected).max() < 2e-3)

    products()
    if not right():
        return False
    device.clear(to)
    device.capture(products).replay()
    return right()


def free_memory(device: Device) -> int:
    """Bytes that can still be allocated, but for what the driver takes later on. Where GPU and CPU share
    their memory, what the CPU counts: the GPU's own count leaves out what the page cache would give back.
    """
    device.enter()
    if device.busy:
        device.synchronize()  # what was given up is free then
    free = machine.available_memory() if device.integrated else device.memory()[0]
    return max(0, free - device.room)


MEASURED = 64 << 20  # bytes that are copied to measure a device


def rates(device: Device) -> tuple[float, float]:
    """GB/s of a plain copy within the device (read and written), and of the bus to it from pinned memory.

    Raises DeviceError.
    """
    size = min(MEASURED, device.memory()[0] // 4)
    a, b, host = device.allocate(size), device.allocate(size), device.pinned((size,), np.uint8)
    inside, over = (
        min(device.seconds(copy) for _ in range(3))
        for copy in (lambda: device.copy(a, b), lambda: device.upload(a, host))
    )
    device.synchronize()
    return 2 * size / max(inside, 1e-9) / 1e9, size / max(over, 1e-9) / 1e9


def report(library: str = LIBRARY) -> dict[str, Any]:
    """Facts for `tinychat doctor`. Where something is missing, "gpu_problem" says what."""
    try:
        device = Device(library)
    except (DeviceMissingError, DeviceError) as e:
        return {"gpu": f"none ({e})"}
    free, total = device.memory()
    kept = locations.kernels_dir()
    facts: dict[str, Any] = {
        "gpu": f"{device.name}, sm_{device.capability}, {device.processors} processors",
        "gpu_driver": "CUDA {}.{}".format(*device.driver_version),
        "gpu_memory": f"{machine.human_bytes(free)} of {machine.human_bytes(total)} free",
        "gpu_kernels": f"{len(list(kept.glob('*.kernel')))} compiled in {kept}",
    }
    try:
        compiler = next(compilers(device.driver_version))
        facts["gpu_compiler"] = f"{compiler.title} for {compiler.target(device.capability)}"
    except (CompilerMissingError, CompileError) as e:
        facts["gpu_problem"] = f"{e} Until then the CPU is used: {INSTALL}"
    device.close()
    return facts
