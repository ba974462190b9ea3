"""Compiled kernels: made at first use for the GPU that is there, kept on disk, loaded once a process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tinychat.kernels_cuda.driver import Device, Kernel, RefusedError

SOURCES = Path(__file__).parent / "src"
MAGIC = b"TINYCUDA"
DIGEST = 32
AT_ONCE = 4  # compilations: each takes 100 MB or more

Defines = dict[str, str]
Unit = tuple[str, tuple[tuple[str, str], ...]]  # a source and how it is compiled


class Compiler(Protocol):
    """NVRTC, or what stands for it where there is no GPU."""

    @property
    def name(self) -> str:
        """It, its whole version, its options, and whatever else changes what it makes."""
        ...

    def target(self, capability: int) -> str:
        """Target to compile for on a GPU of this compute capability."""
        ...

    def compile(
        self, source: Path, headers: list[Path], target: str, defines: dict[str, str]
    ) -> tuple[bytes, str]:
        """The module and the compiler's log."""
        ...


def headers() -> list[Path]:
    """Headers that sources may include."""
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

    def holds(self, source: str, defines: dict[str, str], target: str) -> bool:
        """Whether there is a compiled module, sound or not."""
        return self.path(source, defines, target).exists()

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

    def __init__(self, device: Device, cache: Cache, tell: Callable[[str], None] | None = None):
        """tell: hears, once, that kernels have to be compiled; it may be set again for the next model."""
        self.device, self.cache, self.tell = device, cache, tell
        self.hints = True  # whether copies may have them (src/device.cuh)
        self.target = cache.compiler.target(device.capability)
        self._modules: dict[Unit, Any] = {}
        self._kernels: dict[Any, Kernel] = {}

    def kernel(self, source: str, name: str, defines: Defines | None = None) -> Kernel:
        """The kernel `name` of `source`, compiled with `defines`."""
        unit = self._unit(source, defines or {})
        if (unit, name) not in self._kernels:
            self.prepare([(source, defines or {})])
            self._kernels[unit, name] = self.device.kernel(self._modules[unit], name)
        return self._kernels[unit, name]

    def prepare(self, sources: Iterable[tuple[str, Defines]]) -> None:
        """Have these sources ready; what was never compiled is, several at once."""
        todo = [u for u in dict.fromkeys(self._unit(*s) for s in sources) if u not in self._modules]
        missing = [u for u in todo if not self.cache.holds(u[0], dict(u[1]), self.target)]
        if missing and self.tell:
            tell, self.tell = self.tell, None
            tell(f"Compiling kernels for {self.target}, once for this GPU.")
        with ThreadPoolExecutor(max(1, min(AT_ONCE, os.cpu_count() or 1, len(missing)))) as pool:
            failed = (
                threading.Event()
            )  # then those that wait are not begun; they stand behind those that were

            def image(unit: Unit) -> bytes:
                if failed.is_set():
                    raise CancelledError
                try:
                    return self.cache.image(unit[0], dict(unit[1]), self.target)
                except BaseException:
                    failed.set()
                    raise

            images = {u: pool.submit(image, u) for u in todo}
            try:
                for unit, made in images.items():
                    self._modules[unit] = self._load(unit, made.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _load(self, unit: Unit, image: bytes) -> Any:
        try:
            return self.device.module(image)
        except RefusedError:
            # What another driver or a damaged compiler left: once more from the source.
            source, defines = unit[0], dict(unit[1])
            self.cache.discard(source, defines, self.target)
            return self.device.module(self.cache.image(source, defines, self.target))

    def _unit(self, source: str, defines: Defines) -> Unit:
        return source, tuple(sorted((defines if self.hints else {**defines, "HINTS": "0"}).items()))
