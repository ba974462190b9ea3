"""NVIDIA's run-time compiler, through its C interface.

Only the library is needed: the kernels include no header of CUDA's. It comes with a wheel of a few hundred
megabytes on disk (`pip install nvidia-cuda-nvrtc-cu12`) or with a CUDA toolkit, and works without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST = (12, 0)
TOOLKITS = ("/usr/local/cuda",)
Version = tuple[int, int]

# No contraction: where a product and a sum are one rounding, the source says fmaf.
OPTIONS = ("--std=c++17", "--fmad=false")
TRIAL = b'extern "C" __global__ void trial(float* x) { *x = 1; }'


class CompilerMissingError(Exception):
    """No NVRTC, or one that is too old; the text says what to install."""


class CompileError(Exception):
    """The compiler refused a source; the text is its log."""


def candidates() -> list[str]:
    """Places where the library may lie: TINYCHAT_NVRTC, wheels, toolkits, the loader's own places."""
    if override := os.environ.get("TINYCHAT_NVRTC"):
        return [override]
    found: list[str] = []
    for place in filter(os.path.isabs, sys.path):  # others are the working directory's
        for pattern in ("nvidia/cuda_nvrtc/lib/libnvrtc.so.*", "nvidia/cu1?/lib/libnvrtc.so.*"):
            found += sorted(glob.glob(os.path.join(glob.escape(place), pattern)), reverse=True)
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *TOOLKITS):
        if toolkit:
            for folder in ("lib64", "lib", "targets/*/lib"):
                found += sorted(
                    glob.glob(os.path.join(glob.escape(toolkit), folder, "libnvrtc.so.*")), reverse=True
                )
    if name := ctypes.util.find_library("nvrtc"):
        found.append(name)
    places: dict[str, str] = {}
    for file in found:
        places.setdefault(os.path.realpath(file), file)
    return list(places.values())


def compilers(driver: Version | None = None) -> Iterator[Nvrtc]:
    """Compilers that work, the best first. driver: the CUDA version that it knows. What a newer compiler with
    the same first number makes may still load, so such ones come last; of a newer first number it would not.

    Raises CompilerMissingError if there is none.
    """
    why = "NVRTC, CUDA's run-time compiler, is not installed."
    known: list[Nvrtc] = []
    for path in candidates():
        try:
            found = Nvrtc(path)
        except CompilerMissingError as e:
            why = str(e)
            continue
        if driver is None or found.version[0] <= driver[0]:
            known.append(found)
        else:
            why = f"{found.title} is newer than the driver (CUDA {driver[0]}.{driver[1]})."

    def rank(compiler: Nvrtc) -> tuple[bool, int, int]:
        major, minor = compiler.version
        newer = driver is not None and compiler.version > driver
        return newer, -major, minor if newer else -minor

    works = False
    for compiler in sorted(known, key=rank):
        try:
            compiler.try_out()
        except CompileError as e:
            why = f"{compiler.title} in {compiler.path} does not compile ({' '.join(str(e).split())})."
            continue
        works = True
        yield compiler
    if not works:
        raise CompilerMissingError(why)


class Nvrtc:
    """A loaded compiler."""

    def __init__(self, path: str):
        """Raises CompilerMissingError."""
        self.path, self.build = path, ""
        if os.path.isabs(path):
            # It looks for them by their name alone, and that of CUDA 13.0 not in its own folder.
            for builtins in glob.glob(glob.escape(os.path.dirname(path)) + "/libnvrtc-builtins.so.*"):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(builtins)
        try:
            self._library = ctypes.CDLL(path)
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        except (OSError, AttributeError, CompileError) as e:
            raise CompilerMissingError(f"NVRTC does not load ({e}).") from None
        self.version = major.value, minor.value
        if self.version < OLDEST:
            raise CompilerMissingError(f"{self.title} is older than CUDA 12.")

    @property
    def title(self) -> str:
        """Compiler and version, for people."""
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    @property
    def name(self) -> str:
        """What a compiled kernel is kept under: compiler, version with its patch, and options."""
        return " ".join(["nvrtc", self.build or "{}.{}".format(*self.version), *OPTIONS])

    def try_out(self) -> None:
        """Compile something, and learn the whole version from it. Raises CompileError."""
        text, _ = self._compile(TRIAL, "trial.cu", [], f"compute_{self.architectures()[-1]}", [])
        found = re.search(rb"^// Cuda compilation tools, .*\bV([\d.]+)", text, re.M)
        self.build = found[1].decode() if found else ""

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
                f"{self.title} does not know GPUs of compute capability {capability / 10}."
            )
        return f"compute_{older[-1]}"

    def compile(
        self, source: Path, headers: list[Path], target: str, defines: dict[str, str], verbose: bool = False
    ) -> tuple[bytes, str]:
        """Machine code (or PTX, for a "compute_…" target) and the log; verbose: with ptxas's resource usage.

        Raises CompileError.
        """
        options = [f"-D{name}={value}" for name, value in sorted(defines.items())]
        if verbose:
            options.append("--ptxas-options=-v")
        return self._compile(source.read_bytes(), source.name, headers, target, options)

    def _compile(
        self, source: bytes, name: str, headers: list[Path], target: str, options: list[str]
    ) -> tuple[bytes, str]:
        options = [f"--gpu-architecture={target}", *OPTIONS, *options]
        program = ctypes.c_void_p()
        texts = _strings([h.read_text() for h in headers])
        names = _strings([h.name for h in headers])
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source, name.encode(), len(headers), texts, names
            )
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{name} for {target}: {log}")
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


def _strings(values: list[str]) -> ctypes.Array:
    return (ctypes.c_char_p * max(1, len(values)))(*(v.encode() for v in values))
