"""Weights in the CPU kernels' own layout: made at first load, one module at a time; memory-mapped afterwards.

A pack file: 4096 bytes of header (magic, version, where the index is, its checksum), the weights, the index
(JSON: the file's name, which says what it was made of, where each module lies, and the checksum of each
part). It is written under another name and renamed
when complete, so a pack that has the right name is whole. Disks rot and cables fail, so what a pack holds is
checked too (`pack_check.py`); a damaged pack is made again. Small packs are copied into huge pages instead of
mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tinychat.base import locations
from tinychat.base.errors import DamagedWeightsError
from tinychat.base.files import open_regular, watched
from tinychat.kernels_cpu import _native
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear, Int8Linear, Linear, QuantizedLinear

VERSION = 3
MAGIC = b"TINYPACK"
PAGE = 4096
HEADER = struct.Struct("<8sIIQQQ")  # magic, version, index checksum, index offset, index size, file size

# kernels_cpu/src/layout.h
W4, W8, F32, F16, BF16 = range(5)
SYMMETRIC, ZERO4, OFFSET16, FLOAT, NONE = range(5)
ACT_GROUP = 32
SMALL = 256 << 20  # a pack up to this size is read into huge pages: 4 % more bandwidth for 40 ms at start


@dataclass(frozen=True)
class PackedLinear:
    """A linear for the kernels. perm: the order in which it takes its inputs, or None."""

    native: Any
    perm: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.native.shape


class Packs:
    """Gives a model file its weights, in the kernels' layout."""

    def __init__(self, data: Any, index: dict[str, Any]):
        self._data, self.index = data, index
        self.damaged: list[str] = []  # modules that were found damaged while they were in use

    def check_usable(self) -> None:
        """Raises DamagedWeightsError once a check in the background has found rot."""
        if self.damaged:
            raise DamagedWeightsError(
                f"The stored weights were damaged on disk ({', '.join(self.damaged[:3])}); they are removed.",
                "Load the model again: they are made anew from the model's own file.",
            )

    def bad_parts(self, first: int = 0, last: int | None = None) -> list[str]:
        """Names of the modules whose bytes do not have the checksum that they were written with, among the
        parts first … last - 1 of the file. Reads all of those.
        """
        parts = self.index["parts"][first:last]
        bad = {at for at, size, sum in parts if checksum(self.array([at, size], np.uint8)) != sum}
        return _owners(self.index, bad) if bad else []

    def vector(self, name: str) -> np.ndarray:
        """float32 [n]."""
        return self.array(self.index["vectors"][name], np.float32)

    def linear(self, *names: str) -> tuple[PackedLinear, ...]:
        """Linears that share an input."""
        return tuple(self._linear(n) for n in names)

    def router(self, name: str) -> tuple[PackedLinear, ...]:
        """What chooses experts."""
        return (self._linear(name),)

    def embedding(self, name: str) -> tuple[PackedLinear, ...]:
        """The embedding (rows are token ids)."""
        return (self._linear(name),)

    def head(self, name: str, tied_to: Any) -> Any:
        """The output head, or the embedding where they are one."""
        return (self._linear(name),) if name in self.index["linears"] else tied_to

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """What the index says lies there."""
        offset, size = at
        return np.frombuffer(self._data, np.uint8, size, offset).view(dtype)

    def _linear(self, name: str) -> PackedLinear:
        e = self.index["linears"][name]
        bias = None if e["bias"] is None else self.array(e["bias"], np.float32)
        perm = None if e["perm"] is None else self.array(e["perm"], np.int32)
        data = self.array(e["data"], np.uint8)
        return PackedLinear(_native.Linear(*e["form"], data, bias), perm)


def load(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    family: ModuleType,
    threads: int,
    tell: Callable[[str], None] | None = None,
) -> Packs:
    """The checkpoint's pack: mapped if there is a sound one, else made (and kept, if the disk has room).

    tell hears of what takes long.
    """
    path = pack_path(checkpoint, policy, tell=tell)
    return opened(
        path, lambda sink: CpuPacker(checkpoint, policy, sink, threads).pack(family), checkpoint, tell
    )


def opened(
    path: Path,
    build: Callable[[Any], dict[str, Any]],
    checkpoint: Checkpoint,
    tell: Callable[[str], None] | None = None,
    at_once: bool = False,
) -> Packs:
    """The pack at `path`; without a sound one, what `build` puts into a sink (it returns the index).

    at_once: all of it will be read now, so it is checked now.
    Raises CheckpointError for a checkpoint that is changed while it is read.
    """
    from tinychat.backends import pack_check

    pack = pack_check.sound(path, tell, at_once)
    if pack is not None:
        return pack
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as f:
                build(_File(f, path.name))
            checkpoint.check_unchanged()  # its name in the cache says what it was made of
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        pack_check.note(path)
        pack = read(path)
        if pack is not None:
            return pack
        reason = "it reads back damaged"
    except OSError as e:
        reason = e.strerror or str(e)
    warnings.warn(
        f"The packed weights could not be kept in {path.parent} ({reason}); they stay in memory and will be"
        " made again next time. Free some space, or set TINYCHAT_HOME to another disk.",
        RuntimeWarning,
        stacklevel=2,
    )
    memory = _Memory()
    index = build(memory)
    checkpoint.check_unchanged()
    return _MemoryPacks(memory.parts, index)


def pack_path(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    layout: str = "lanes16",
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Where the pack of these weights lies. Every ISA reads the same layout, so its name is no part of it."""
    fingerprint = checkpoint.fingerprint(tell)
    key = f"{fingerprint}|{policy.quantize}|{policy.head_bits}|{layout}|{VERSION}"
    rest = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pack"
    return locations.packs_dir() / locations.pack_name(fingerprint, rest)


def checksum(a: np.ndarray) -> int:
    """64 bits that change when the array's bytes do."""
    return _native.checksum(np.ascontiguousarray(a).reshape(-1).view(np.uint8))


def _owners(index: dict[str, Any], starts: set[int]) -> list[str]:
    """Names of the modules that have a part at one of these places."""
    names = []
    for kind in ("vectors", "linears"):
        for name, entry in index[kind].items():
            places = entry.values() if isinstance(entry, dict) else [entry]
            if any(isinstance(p, list) and len(p) == 2 and p[0] in starts for p in places):
                names.append(name)
    return names


def read(path: Path) -> Packs | None:
    """The pack, or None if there is none, its header or index is damaged, or it was written under another
    name: that is one of other weights. What it holds is not looked at.
    """
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            magic, version, crc, at, length, whole = HEADER.unpack(f.read(HEADER.size))
            if magic != MAGIC or version != VERSION or whole != size or at + length != size:
                return None
            if size <= SMALL:
                data = np.frombuffer(_huge(f, size), np.uint8)
            else:
                whole = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
                with contextlib.suppress(OSError, AttributeError):
                    whole.madvise(mmap.MADV_WILLNEED)  # starts without reading all of it first
                data = watched(whole, path)
        raw = data[at : at + length]
        if checksum(raw) & 0xFFFFFFFF != crc:
            return None
        index = json.loads(raw.tobytes())
        return Packs(data, index) if index["name"] == path.name else None
    except (OSError, struct.error, ValueError, LookupError, TypeError):
        return None


def _huge(f: Any, size: int) -> mmap.mmap:
    """The file's content in memory of huge pages, where the system has them."""
    data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0x20))
    with contextlib.suppress(OSError, AttributeError):
        data.madvise(mmap.MADV_HUGEPAGE)
    f.seek(0)
    if f.readinto(data) != size:
        raise ValueError("the file became shorter")
    return data


def _sweep(folder: Path) -> None:
    """Remove what processes left that died while packing, and packs that no version reads any more."""
    for f in folder.glob("*.pack"):
        with contextlib.suppress(OSError, struct.error):
            with open_regular(f) as opened:
                magic, version, *_ = HEADER.unpack(opened.read(HEADER.size))
            if magic == MAGIC and version < VERSION:
                f.unlink()
    for f in folder.glob("*.partial"):
        pid = f.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            with contextlib.suppress(OSError):
                f.unlink()


class _File:
    """Writes parts one behind the other, each at a page. name: what the file will be called."""

    def __init__(self, f: Any, name: str):
        self.f, self.name, self.at = f, name, PAGE
        self.parts: list[list[int]] = []  # where each lies, its size and its checksum
        f.seek(PAGE)

    def put(self, a: np.ndarray) -> list[int]:
        start = -(-self.at // PAGE) * PAGE
        self.f.seek(start)
        self.f.write(memoryview(a).cast("B"))
        self.at = start + a.nbytes
        self.parts.append([start, a.nbytes, checksum(a)])
        return [start, a.nbytes]

    def finish(self, index: dict[str, Any]) -> None:
        index |= {"name": self.name, "parts": self.parts}
        raw = np.frombuffer(json.dumps(index).encode(), np.uint8)
        at, length = self.put(raw)
        crc = checksum(raw) & 0xFFFFFFFF
        self.f.seek(0)
        self.f.write(HEADER.pack(MAGIC, VERSION, crc, at, length, at + length))
        self.f.flush()
        os.fsync(self.f.fileno())


class _Memory:
    """Keeps parts in memory."""

    def __init__(self):
        self.parts: list[np.ndarray] = []

    def put(self, a: np.ndarray) -> list[int]:
        self.parts.append(a)
        return [len(self.parts) - 1, a.nbytes]

    def finish(self, index: dict[str, Any]) -> None:
        pass


class _MemoryPacks(Packs):
    """Packs that no file holds."""

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        return self._data[at[0]].view(dtype)


class Packer:
    """The loader that a model file asks for its weights while they are packed; `entry` packs one."""

    def __init__(self, checkpoint: Checkpoint, policy: WeightPolicy, sink: Any):
        self.checkpoint, self.policy, self.sink = checkpoint, policy, sink
        self.index: dict[str, Any] = {"linears": {}, "vectors": {}}

    def pack(self, family: ModuleType) -> dict[str, Any]:
        """All weights, one after the other; the index."""
        family.load(self, self.checkpoint.config)
        self.sink.finish(self.index)
        return self.index

    def entry(self, w: Linear) -> dict[str, Any]:
        """Put a linear into the sink; where its parts are, and its form."""
        raise NotImplementedError

    def put(self, a: np.ndarray | None, dtype: Any = None) -> list[int] | None:
        """Where an array is in the sink, if there is one."""
        return None if a is None else self.sink.put(np.ascontiguousarray(a, dtype))

    def vector(self, name: str) -> None:
        if name not in self.index["vectors"]:
            self.index["vectors"][name] = self.put(self.checkpoint.vector(name), np.float32)

    def linear(self, *names: str) -> None:
        for name in names:
            self._add(name, self.policy.linear(self.checkpoint, name))

    def router(self, name: str) -> None:
        self._add(name, self.policy.router(self.checkpoint, name))

    def embedding(self, name: str) -> None:
        self._add(name, self.policy.embedding(self.checkpoint, name))

    def head(self, name: str, tied_to: Any) -> None:
        head = self.policy.head(self.checkpoint, name)
        if head is not None:
            self._add(name, head)

    def _add(self, name: str, w: Linear) -> None:
        self.index["linears"][name] = self.entry(w)


class CpuPacker(Packer):
    """For the CPU kernels."""

    def __init__(self, checkpoint: Checkpoint, policy: WeightPolicy, sink: Any, threads: int = 1):
        super().__init__(checkpoint, policy, sink)
        self.threads = threads

    def entry(self, w: Linear) -> dict[str, Any]:
        form, codes, scales, aux, perm = canonical(w)
        out = aligned(_native.packed_bytes(*form))
        _native.pack(*form, codes, scales, aux, out, self.threads)
        return {
            "form": list(form),
            "data": self.put(out),
            "bias": self.put(w.bias, np.float32),
            "perm": self.put(perm, np.int32),
        }


def pack(w: Linear, threads: int = 1) -> PackedLinear:
    """One linear for the kernels, in memory."""
    form, codes, scales, aux, perm = canonical(w)
    out = aligned(_native.packed_bytes(*form))
    _native.pack(*form, codes, scales, aux, out, threads)
    bias = None if w.bias is None else np.ascontiguousarray(w.bias, np.float32)
    perm = None if perm is None else np.ascontiguousarray(perm, np.int32)
    return PackedLinear(_native.Linear(*form, out, bias), perm)


def canonical(w: Linear) -> tuple[tuple[int, ...], np.ndarray, Any, Any, np.ndarray | None]:
    """(kind, meta, n, k, group), codes, scales, zeros or offsets, perm: what `_native.pack` takes.

    The smallest form that holds the weight exactly. Groups that are no whole activation groups run in fp32.
    """
    n, k = w.shape
    if isinstance(w, QuantizedLinear) and w.group % ACT_GROUP == 0:
        scales16 = _exact16(w.scales)
        codes = np.ascontiguousarray(w.codes)
        if w.zeros is not None and scales16 is not None and w.zeros.max() <= 15:
            if (w.zeros == 8).all():
                return (W4, SYMMETRIC, n, k, w.group), codes, scales16, None, w.perm
            zeros = np.ascontiguousarray(w.zeros, np.uint8)
            return (W4, ZERO4, n, k, w.group), codes, scales16, zeros, w.perm
        offsets16 = None if w.offsets is None else _exact16(w.offsets)
        if scales16 is not None and offsets16 is not None:
            return (W4, OFFSET16, n, k, w.group), codes, scales16, offsets16, w.perm
        scales = np.ascontiguousarray(w.scales, np.float32)
        if w.offsets is not None:
            offsets = np.ascontiguousarray(w.offsets, np.float32)
        else:
            offsets = -w.zeros.astype(np.float32) * scales
        return (W4, FLOAT, n, k, w.group), codes, scales, offsets, w.perm
    if isinstance(w, Int8Linear) and w.group % ACT_GROUP == 0:
        codes, scales16 = np.ascontiguousarray(w.codes), _exact16(w.scales)
        if scales16 is not None:
            return (W8, SYMMETRIC, n, k, w.group), codes, scales16, None, None
        scales = np.ascontiguousarray(w.scales, np.float32)
        return (W8, FLOAT, n, k, w.group), codes, scales, np.zeros_like(scales), None
    if isinstance(w, DenseLinear) and w.bf16:
        return (BF16, NONE, n, k, 0), np.ascontiguousarray(w.weight), None, None, None
    if isinstance(w, DenseLinear) and w.weight.dtype == np.float16:
        return (F16, NONE, n, k, 0), np.ascontiguousarray(w.weight).view(np.uint16), None, None, None
    return (F32, NONE, n, k, 0), np.ascontiguousarray(w.dequantize(), np.float32), None, None, None


def _exact16(a: np.ndarray) -> np.ndarray | None:
    """fp16 bits of `a`, or None if fp16 does not hold it exactly."""
    if a.dtype == np.float16:
        return np.ascontiguousarray(a).view(np.uint16)
    with np.errstate(over="ignore"):
        half = a.astype(np.float16)
    return np.ascontiguousarray(half).view(np.uint16) if (half.astype(a.dtype) == a).all() else None


def aligned(size: int) -> np.ndarray:
    """uint8 [size] at a 64-byte boundary."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
