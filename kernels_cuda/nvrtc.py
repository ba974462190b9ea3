"""NVIDIA's run-time compiler, through its C interface.

Only the library is needed: the kernels include no header of CUDA's. It comes with a wheel of a few hundred
megabytes on disk (`pip install nvidia-cuda-nvrtc-cu12`) or with a CUDA toolkit, and works without a GPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import os
import sys
from pathlib import Path

OLDEST = (12, 0)


class CompilerMissingError(Exception):
    """No NVRTC, or one that is too old; the text says what to install."""


class CompileError(Exception):
    """The compiler refused a source; the text is its log."""


def candidates() -> list[str]:
    """Places where the library may lie: TINYCHAT_NVRTC, wheels, toolkits, the loader's own places."""
    if override := os.environ.get("TINYCHAT_NVRTC"):
        return [override]
    found: list[str] = []
    for place in sys.path:
        for pattern in ("nvidia/cuda_nvrtc/lib/libnvrtc.so.*", "nvidia/cu1?/lib/libnvrtc.so.*"):
            found += sorted(glob.glob(os.path.join(place or ".", pattern)), reverse=True)
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            for folder in ("lib64", "lib", "targets/*/lib"):
                found += sorted(glob.glob(os.path.join(toolkit, folder, "libnvrtc.so.*")), reverse=True)
    if name := ctypes.util.find_library("nvrtc"):
        found.append(name)
    return found


class Nvrtc:
    """A loaded compiler."""

    def __init__(self, driver: int | None = None):
        """driver: the first number of the CUDA version that the driver knows; code of a newer compiler would
        not load. Raises CompilerMissingError.
        """
        why = "NVRTC, CUDA's run-time compiler, is not installed."
        for self.path in candidates():
            try:
                self._library = ctypes.CDLL(self.path)
            except OSError:
                continue
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
            self.version = major.value, minor.value
            if self.version >= OLDEST and (driver is None or self.version[0] <= driver):
                return
            fits = "older than CUDA 12" if self.version < OLDEST else f"newer than the driver (CUDA {driver})"
            why = f"{self.name.upper()} is {fits}."
        raise CompilerMissingError(why)

    @property
    def name(self) -> str:
        """Compiler and version: part of what a compiled kernel is kept under."""
        return f"nvrtc {self.version[0]}.{self.version[1]}"

    def architectures(self) -> list[int]:
        """Compute capabilities that it compiles for, as 10 · major + minor."""
        n = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(n)))
        values = (ctypes.c_int * n.value)()
        self._check(self._library.nvrtcGetSupportedArchs(values))
        return sorted(values)

    def target(self, capability: int) -> str:
        """The GPU itself, or PTX of the newest older one, which its driver translates."""
        known = self.architectures()
        if capability in known:
            return f"sm_{capability}"
        older = [a for a in known if 80 <= a < capability]
        if not older:
            raise CompilerMissingError(
                f"{self.name} does not know GPUs of compute capability {capability / 10}."
            )
        return f"compute_{older[-1]}"

    def compile(
        self, source: Path, headers: list[Path], target: str, defines: dict[str, str], verbose: bool = False
    ) -> tuple[bytes, str]:
        """Machine code (or PTX, for a "compute_…" target) and the log; verbose: with ptxas's resource usage.

        Raises CompileError.
        """
        options = options_for(target, defines) + (["--ptxas-options=-v"] if verbose else [])
        program = ctypes.c_void_p()
        texts = _strings([h.read_text() for h in headers])
        names = _strings([h.name for h in headers])
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names
            )
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{source.name} for {target}: {log}")
            return self._get(program, "CUBIN" if target.startswith("sm_") else "PTX"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, status: int) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(self._library.nvrtcGetErrorString(status).decode())


def options_for(target: str, defines: dict[str, str]) -> list[str]:
    """Compiler options. No contraction: where a product and a sum are one rounding, the source says fmaf."""
    return [
        f"--gpu-architecture={target}",
        "--std=c++17",
        "--fmad=false",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    ]


def _strings(values: list[str]) -> ctypes.Array:
    return (ctypes.c_char_p * max(1, len(values)))(*(v.encode() for v in values))
