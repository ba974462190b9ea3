"""Pack files: weights in the layout of one backend's kernels, in parts that are memory-mapped and checked.

A pack file: 4096 bytes of header (magic, version, where the index is, its checksum), the parts, the index
(JSON: the file's name, which says what it was made of, where each module lies, and the checksum of each
part). Nothing here knows what the parts hold. It is written under another name and renamed when complete, so
a pack that has the right name is whole (`pack_store.py`). Disks rot and cables fail, so what a pack holds is
checked too (`pack_check.py`). Small packs are copied into huge pages instead of mapped.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinychat.base.errors import DamagedWeightsError
from tinychat.base.files import open_regular, watched
from tinychat.kernels_cpu import _native

VERSION = 4
MAGIC = b"TINYPACK"
PAGE = 4096
HEADER = struct.Struct("<8sIIQQQ")  # magic, version, index checksum, index offset, index size, file size
SMALL = 256 << 20  # a pack up to this size is read into huge pages: 4 % more bandwidth for 40 ms at start


class Pack:
    """Parts by what the index says of them.

    index   "vectors": where each norm lies. "linears": for each linear what its layout wrote, by name
    damaged names of modules that were found damaged while they were in use
    """

    def __init__(self, data: Any, index: dict[str, Any]):
        self._data, self.index = data, index
        self.damaged: list[str] = []

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
        """A norm's weight: float32 [n]."""
        return self.array(self.index["vectors"][name], np.float32)

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """One part, flat; `at` as `put` gave it."""
        offset, size = at
        return np.frombuffer(self._data, np.uint8, size, offset).view(dtype)


class PackInMemory(Pack):
    """Pack that a `MemorySink` took, where no disk holds it."""

    def array(self, at: list[int], dtype: Any) -> np.ndarray:
        """One part, flat."""
        return self._data[at[0]].reshape(-1).view(np.uint8).view(dtype)


class FileSink:
    """Writes parts one behind the other, each at a page. name: what the file will be called."""

    def __init__(self, f: BinaryIO, name: str):
        self.f, self.name, self.at = f, name, PAGE
        self.parts: list[list[int]] = []  # where each lies, its size and its checksum
        f.seek(PAGE)

    def put(self, a: np.ndarray) -> list[int]:
        """Write a part; where it lies and its size."""
        start = -(-self.at // PAGE) * PAGE
        self.f.seek(start)
        self.f.write(a.reshape(-1).view(np.uint8).data)
        self.at = start + a.nbytes
        self.parts.append([start, a.nbytes, checksum(a)])
        return [start, a.nbytes]

    def finish(self, index: dict[str, Any]) -> None:
        """Write the index and then the header: the file is whole, and on the disk."""
        index |= {"name": self.name, "parts": self.parts}
        raw = np.frombuffer(json.dumps(index).encode(), np.uint8)
        at, length = self.put(raw)
        crc = checksum(raw) & 0xFFFFFFFF
        self.f.seek(0)
        self.f.write(HEADER.pack(MAGIC, VERSION, crc, at, length, at + length))
        self.f.flush()
        os.fsync(self.f.fileno())


class MemorySink:
    """Keeps parts in memory."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def put(self, a: np.ndarray) -> list[int]:
        """Keep a part; its number and its size."""
        self.parts.append(a)
        return [len(self.parts) - 1, a.nbytes]

    def finish(self, index: dict[str, Any]) -> None:
        """Nothing is left to do."""


def checksum(a: np.ndarray) -> int:
    """64 bits that change when the array's bytes do."""
    return _native.checksum(np.ascontiguousarray(a).reshape(-1).view(np.uint8))


def read(path: Path) -> Pack | None:
    """The pack, or None if there is none, its header or index is damaged, or it was written under another
    name: that is one of other weights. What it holds is not looked at.
    """
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            magic, version, crc, at, length, end = HEADER.unpack(f.read(HEADER.size))
            if magic != MAGIC or version != VERSION or end != size or at + length != size:
                return None
            if size <= SMALL:
                data = np.frombuffer(_huge(f, size), np.uint8)
            else:
                whole = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
                with contextlib.suppress(OSError, AttributeError):
                    whole.madvise(mmap.MADV_HUGEPAGE)  # where the file system has them
                with contextlib.suppress(OSError, AttributeError):
                    whole.madvise(mmap.MADV_WILLNEED)  # starts without reading all of it first
                data = watched(whole, path)
        raw = data[at : at + length]
        if checksum(raw) & 0xFFFFFFFF != crc:
            return None
        index = json.loads(raw.tobytes())
        return Pack(data, index) if index["name"] == path.name else None
    except (OSError, struct.error, ValueError, LookupError, TypeError):
        return None


def is_outdated(path: Path) -> bool:
    """Whether the file is a pack that no version reads any more. Raises OSError."""
    with open_regular(path) as f:
        header = f.read(HEADER.size)
    if len(header) < HEADER.size:
        return False
    magic, version, *_ = HEADER.unpack(header)
    return magic == MAGIC and version < VERSION


def _owners(index: dict[str, Any], starts: set[int]) -> list[str]:
    """Names of the modules that have a part at one of these places."""
    names = []
    for kind in ("vectors", "linears"):
        for name, entry in index[kind].items():
            places = entry.values() if isinstance(entry, dict) else [entry]
            if any(isinstance(p, list) and len(p) == 2 and p[0] in starts for p in places):
                names.append(name)
    return names


def _huge(f: BinaryIO, size: int) -> mmap.mmap:
    """The file's content in memory of huge pages, where the system has them."""
    data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0x20))
    with contextlib.suppress(OSError, AttributeError):
        data.madvise(mmap.MADV_HUGEPAGE)
    f.seek(0)
    if f.readinto(data) != size:  # type: ignore[attr-defined]  # a file that was opened for reading has it
        raise ValueError("the file became shorter")
    return data
