"""Compiled kernels: made at first use for the GPU that is there, kept on disk, loaded once a process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from tinychat.kernels_cuda.driver import Device, DeviceError, Kernel

SOURCES = Path(__file__).parent / "src"
MAGIC = b"TINYCUDA"
DIGEST = 32


class Compiler(Protocol):
    """NVRTC, or what stands for it where there is no GPU."""

    name: str

    def target(self, capability: int) -> str:
        """What to compile for on a GPU of this compute capability."""
        ...

    def compile(
        self, source: Path, headers: list[Path], target: str, defines: dict[str, str]
    ) -> tuple[bytes, str]:
        """The module and the compiler's log."""
        ...


def headers() -> list[Path]:
    """What sources may include."""
    return sorted(SOURCES.glob("*.cuh"))


class Cache:
    """A folder of compiled modules. Several processes may use it: a file appears complete or not at all."""

    def __init__(self, folder: Path, compiler: Compiler):
        self.folder, self.compiler = folder, compiler

    def path(self, source: str, defines: dict[str, str], target: str) -> Path:
        """Whatever decides what the compiler makes is in the name."""
        key = hashlib.sha256(f"{self.compiler.name}|{target}|{sorted(defines.items())}".encode())
        for file in (SOURCES / source, *headers()):
            key.update(file.read_bytes())
        return self.folder / f"{Path(source).stem}-{target}-{key.hexdigest()[:24]}.kernel"

    def image(self, source: str, defines: dict[str, str], target: str) -> bytes:
        """The compiled module; made (again) if there is no sound one. Raises CompileError."""
        path = self.path(source, defines, target)
        image = _read(path)
        if image is None:
            image, _ = self.compiler.compile(SOURCES / source, headers(), target, defines)
            _write(path, image)
        return image

    def discard(self, source: str, defines: dict[str, str], target: str) -> None:
        """Forget a module that the driver did not take."""
        with contextlib.suppress(OSError):
            self.path(source, defines, target).unlink()


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    image = data[len(MAGIC) + DIGEST :]
    sound = (
        data.startswith(MAGIC) and data[len(MAGIC) : len(MAGIC) + DIGEST] == hashlib.sha256(image).digest()
    )
    return image if sound else None


def _write(path: Path, image: bytes) -> None:
    """A disk that is full or read-only costs the compilation at the next start, nothing else."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as f:
            partial = f.name
            f.write(MAGIC + hashlib.sha256(image).digest() + image)
        os.replace(partial, path)
    except OSError:
        if partial:
            with contextlib.suppress(OSError):
                os.unlink(partial)


class Modules:
    """Kernels on one device, by source and definitions."""

    def __init__(self, device: Device, cache: Cache):
        self.device, self.cache = device, cache
        self.target = cache.compiler.target(device.capability)
        self._modules: dict[Any, Any] = {}
        self._kernels: dict[Any, Kernel] = {}

    def kernel(self, source: str, name: str, defines: dict[str, str] | None = None) -> Kernel:
        """The kernel `name` of `source`, compiled with `defines`."""
        unit = source, tuple(sorted((defines or {}).items()))
        if (unit, name) not in self._kernels:
            if unit not in self._modules:
                self._modules[unit] = self._load(source, defines or {})
            self._kernels[unit, name] = self.device.kernel(self._modules[unit], name)
        return self._kernels[unit, name]

    def _load(self, source: str, defines: dict[str, str]) -> Any:
        try:
            return self.device.module(self.cache.image(source, defines, self.target))
        except DeviceError:
            # What another driver or a damaged compiler left: once more from the source.
            self.cache.discard(source, defines, self.target)
            return self.device.module(self.cache.image(source, defines, self.target))
