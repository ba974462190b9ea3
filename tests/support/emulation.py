"""The CUDA engine without a GPU: g++ in place of NVRTC, `libcuda.cpp` in place of the driver. The rest is
real.

TINYCHAT_TEST_DEVICE=ptx runs what NVRTC makes of the sources instead (ptx.py: slower, stricter), and gpu this
machine's GPU, where the tests of the emulated driver are left out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from ptx import MACHINE, PtxCompiler

from tinychat.kernels_cuda import modules
from tinychat.kernels_cuda.driver import Device, Memory
from tinychat.kernels_cuda.modules import Cache, Modules

HERE = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall"]


DEVICE = os.environ.get("TINYCHAT_TEST_DEVICE", "host")
ON_GPU = DEVICE == "gpu"


def missing() -> str | None:
    """What the emulation needs and this machine does not have."""
    if platform.system() != "Linux":
        return "the emulated driver needs Linux"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    probe = subprocess.run(
        ["g++", "-x", "c++", "-fsyntax-only", "-"], input="_Float16 f(float x) { return x; }", text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    return "this g++ has no _Float16 (12 or newer is needed)" if probe.returncode else None


_missing = missing()
needs_device = pytest.mark.skipif(not ON_GPU and _missing is not None, reason=_missing or "")
needs_emulation = pytest.mark.skipif(
    ON_GPU or _missing is not None, reason="the tests run on a GPU" if ON_GPU else _missing or ""
)


@lru_cache
def _arch_flags() -> tuple[str, ...]:
    """Half conversions in hardware, where the CPU has them: several times faster."""
    try:
        f16c = "f16c" in Path("/proc/cpuinfo").read_text()
    except OSError:
        f16c = False
    return ("-mf16c",) if f16c else ()


class HostCompiler:
    """Sources to shared libraries under src/host.h."""

    name = "g++ host"

    def target(self, capability: int) -> str:
        return "host"

    def compile(self, source, headers, target, defines):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "module.so"
            options = [
                *FLAGS,
                *_arch_flags(),
                "-Wno-unused-function",
                "-Wno-unknown-pragmas",
                "-DTINYCHAT_HOST",
            ]
            options += [f"-D{k}={v}" for k, v in defines.items()]
            command = ["g++", *options, "-x", "c++", str(source), f"-I{source.parent}", "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return out.read_bytes(), done.stderr


@lru_cache
def folder() -> Path:
    """Where what g++ made is kept for the length of a test run (or longer: TINYCHAT_TEST_CACHE)."""
    kept = os.environ.get("TINYCHAT_TEST_CACHE")
    return Path(kept or tempfile.mkdtemp(prefix="tinychat-emulation-"))


@lru_cache
def driver() -> str:
    """The emulated libcuda, built."""
    source = HERE / "kernels_cuda/libcuda.cpp"
    out = folder() / f"libcuda-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *FLAGS, str(source), "-ldl", "-o", str(partial)], check=True)
        os.replace(partial, out)
    return str(out)


@lru_cache
def controls() -> ctypes.CDLL:
    """What libcuda.cpp has beside the driver's functions: `fake_fail` and so on."""
    library = ctypes.CDLL(driver())
    library.fake_device.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    library.fake_used.restype = library.fake_host_used.restype = ctypes.c_size_t
    library.fake_host.argtypes = [ctypes.c_size_t]
    library.fake_said.restype = ctypes.c_char_p
    library.fake_current.restype = ctypes.c_void_p
    library.fake_be_current.argtypes = [ctypes.c_void_p]
    return library


def compiled(compiler) -> Cache:
    """Its modules; of those who run them, NVRTC's key knows nothing, so that is added."""
    used = b"".join(f.read_bytes() for f in (modules.SOURCES / "host.h", *MACHINE, HERE / "support/ptx.py"))
    used += repr((FLAGS, _arch_flags())).encode()
    compiler.name = f"{type(compiler).__name__} {compiler.name} {hashlib.sha256(used).hexdigest()[:16]}"
    return Cache(folder(), compiler)


def cache() -> Cache:
    """What these tests run."""
    return compiled(PtxCompiler() if DEVICE == "ptx" else HostCompiler())


class Bench:
    """A device and its kernels, arrays in and out."""

    def __init__(self):
        if ON_GPU:
            from tinychat.backends.cuda_device import open_modules

            self.modules = open_modules()
        else:
            self.modules = Modules(Device(driver()), cache())
        self.device = self.modules.device

    def put(self, a: np.ndarray | None) -> Memory | None:
        if a is None:
            return None
        a = np.ascontiguousarray(a)
        m = self.device.allocate(a.nbytes)
        self.device.upload(m, a)
        return m

    def get(self, m: Memory, shape, dtype=np.float32) -> np.ndarray:
        out = np.empty(shape, dtype)
        self.device.download(out, m[: out.nbytes])
        self.device.synchronize()
        return out

    def run(self, source, name, grid, threads, *arguments, **defines) -> None:
        kernel = self.modules.kernel(source, name, {k: str(v) for k, v in defines.items()})
        self.device.launch(kernel, grid, threads, *arguments)


@lru_cache
def bench() -> Bench:
    """One for the test run: modules are loaded once."""
    return Bench()
