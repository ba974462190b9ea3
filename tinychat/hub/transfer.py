"""Needs of every way of downloading: room for it, how far it is, hashes, and errors of the disk."""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinychat.base.errors import DownloadError, MemoryBudgetError
from tinychat.base.files import open_regular
from tinychat.base.machine import human_bytes, total_memory
from tinychat.base.terminal import bar
from tinychat.hub.aliases import ALIASES
from tinychat.hub.http import CHUNK, disk_full


def check_room(folder: Path, disk: int, weights: int) -> None:
    """Refuse before a download what cannot work after it."""
    memory = total_memory()
    if weights > memory:
        raise MemoryBudgetError(
            f"The model needs {human_bytes(weights)} of memory; there is {human_bytes(memory)} to be had.",
            _smaller(memory),
        )
    free = shutil.disk_usage(folder).free
    if disk > free:
        raise DownloadError(
            f"The download needs {human_bytes(disk)}; the disk of {folder} has {human_bytes(free)} free.",
            "Free some space, or set TINYCHAT_HOME to another disk.",
        )


def _smaller(memory: int) -> str:
    """The largest known model that fits, by name."""
    fits = [(a.size, name) for name, a in ALIASES.items() if a.size * 1.3 < memory]
    if not fits:
        return "Choose a smaller model: tinychat list --available"
    size, name = max(fits)
    return f"Try {name} ({human_bytes(size)}); others: tinychat list --available"


listener: Callable[[str, int, int], None] | None = None  # hears (label, done, total) of every download


@contextmanager
def progress_bar(label: str, size: int | None) -> Iterator:
    """Yields `update(done, total)`: a bar on a terminal, one line on any other stderr, or the `listener`."""
    if listener is not None:
        yield lambda done, total: listener(label, done, total or 0)
        return
    if not sys.stderr.isatty():
        print(
            f"Downloading {label}" + (f" ({human_bytes(size)})" if size else ""), file=sys.stderr, flush=True
        )
        yield lambda done, total: None
        return
    with bar(label, size, in_bytes=True) as update:
        yield update


@contextmanager
def watched(label: str, folder: Path, total: int) -> Iterator[None]:
    """Show how much of a download by another library is in `folder`, as `progress_bar` does."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            sizes = []
            for path in folder.rglob("*"):
                with suppress(OSError):  # renamed meanwhile
                    sizes.append(path.stat().st_size if path.is_file() else 0)
            update(min(sum(sizes), total), total)

    with progress_bar(label, total) as update:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open_regular(path) as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """OSErrors of writing become errors that a user can act on."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(folder) from e
        raise DownloadError(
            f"{e.filename or folder} cannot be written: {e.strerror or e}.",
            "Set TINYCHAT_HOME to a folder of yours.",
        ) from e
