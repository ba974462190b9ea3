"""Files: read only where they are regular and of a bearable size, written whole or not at all."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tinychat.base.errors import CheckpointError, ModelNotFoundError, TinychatError, UsageError, shortage

MAX_SETTINGS = 8 << 20  # bytes of a JSON file that says how something is; real ones have some thousand
MAX_TEXT = 32 << 20  # bytes of a text that a model is to read; no context holds as much

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class OddFileError(OSError):
    """Raised for what is no regular file, or one too large. `strerror` says which, without the name."""


def open_regular(path: Path | str) -> BinaryIO:
    """A regular file, open for reading. Never waits for anybody, as opening a named pipe would.

    Raises OddFileError for anything else, FileNotFoundError and PermissionError as usual.
    """
    _regular(os.stat(path).st_mode, path)  # before opening: opening a device may set something off
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _regular(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _regular(mode: int, path: Path | str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OddFileError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def read_bytes(path: Path | str, limit: int = MAX_SETTINGS) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises OddFileError beyond that, before anything is read; and what `open_regular` raises.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        content = f.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        from tinychat.base.machine import human_bytes

        size = max(size, len(content))
        said = f"its {human_bytes(size)} are more than the {human_bytes(limit)} that are read"
        raise OddFileError(errno.EFBIG, said, str(path))
    return content


def read_text(path: Path | str, limit: int = MAX_SETTINGS) -> str:
    """The text of a UTF-8 file. Raises UnicodeDecodeError, and what `read_bytes` raises."""
    return read_bytes(path, limit).decode("utf-8")


def read_prose(path: Path | str, limit: int = MAX_TEXT) -> str:
    """The text of a file that the user named. Raises UsageError for whatever is wrong with it."""
    try:
        return read_text(path, limit)
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not a UTF-8 text file.", "Give a text file.") from e
    except OddFileError as e:
        todo = "Give a part of it." if e.errno == errno.EFBIG else "Give a text file, or pipe the text in."
        raise UsageError(f"{path} cannot be read: {e.strerror}.", todo) from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or str(e)
        raise UsageError(f"{path} cannot be read: {reason}.", "Check the name and its permissions.") from e


@dataclass(frozen=True)
class Stamp:
    """Facts that tell whether a file is still the one that it was. Times in nanoseconds.

    `changed` is the time of the last change of the inode, which no program can set: a file that is written
    again in place and given its old size and time is another one.
    """

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: BinaryIO | Path | str) -> Stamp:
        """Stamp of an open file, or of what a path leads to."""
        s = os.stat(file) if isinstance(file, (str, Path)) else os.fstat(file.fileno())
        return cls(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


class MappedFile:
    """A regular file, open and mapped; `data` is all of it, `stamp` what it was when it was opened.

    The file is one and the same from the first byte read to the last, whatever its path leads to later.
    """

    def __init__(self, path: Path):
        """Raises what `open_regular` raises."""
        self.path = path
        with open_regular(path) as f:
            self.stamp = Stamp.of(f)
            self.size = self.stamp.size
            self.data: Any = b""
            if self.size:
                self.data = watched(mmap.mmap(f.fileno(), self.size, access=mmap.ACCESS_READ), path)
            self._file = os.fdopen(os.dup(f.fileno()), "rb", buffering=0)

    def check(self) -> None:
        """Refuse a file that became shorter: reading what the map has lost would end the process."""
        if Stamp.of(self._file).size < self.size:
            raise CheckpointError(
                f"{self.path} became shorter while it was read.", "Wait until it is whole, then try again."
            )

    def check_unchanged(self) -> None:
        """Refuse a file that was written since it was opened: what was read may be of two minds."""
        if Stamp.of(self._file) != self.stamp:
            raise CheckpointError(
                f"{self.path} was changed while it was read.", "Wait until it is whole, then try again."
            )

    @property
    def same_again(self) -> str:
        """A path that other libraries can open to get this very file."""
        return f"/dev/fd/{self._file.fileno()}"

    def read(self, at: int, size: int) -> bytes:
        """A copy of a part, read from the file and not from the map; shorter at the end."""
        return os.pread(self._file.fileno(), size, at)


def watched(whole: mmap.mmap, path: Path) -> Any:
    """A map of a file, read-only uint8 [size]. Where the file became shorter, reading it says so in two lines
    and ends the process with code 1, instead of a bus error.
    """
    import numpy as np

    view = np.frombuffer(whole, np.uint8)
    try:
        from tinychat.kernels_cpu import _native
    except ImportError:  # without kernels nothing runs, but what is wrong can still be shown
        return view
    name = "".join(c if c.isprintable() else "?" for c in str(path))[-300:]
    said = f"Error: {name} became shorter while it was in use, or its disk failed.\n"
    said += "Wait until it is whole, then start again.\n"
    watch = _native.watch_map(view, said.encode("utf-8", "replace").decode())
    weakref.finalize(view, _native.unwatch_map, watch)
    return view


def open_mapped(path: Path) -> MappedFile:
    """A file with weights. Raises ModelNotFoundError or CheckpointError."""
    try:
        return MappedFile(path)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist.", "Give the path of a model.") from None
    except OddFileError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}.", "Give the file itself.") from e
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        unreadable = CheckpointError(f"{path} cannot be read: {reason}.", "Check its permissions.")
        raise shortage(e) or unreadable from e


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename. On failure the old file is as it was.

    Raises TinychatError when the disk is full, the folder cannot be written, or `path` is no regular file.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # renaming over it would replace a device or a pipe by a file
            _regular(path.stat().st_mode, path)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(e, OSError):
            todo = {errno.ENOSPC: "Free some space.", errno.ENAMETOOLONG: "Give a shorter name."}.get(
                e.errno or 0, "Choose a folder that you can write to."
            )
            raise TinychatError(f"Cannot write {path}: {e.strerror}.", todo) from e
        if isinstance(e, ValueError):  # a NUL, or characters that the file system does not have
            raise UsageError(f"{str(path)!r} is not the name of a file.", "Give another name.") from e
        raise
