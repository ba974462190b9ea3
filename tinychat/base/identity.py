"""Identity of a file: a hash of its content, computed here, once, and remembered.

Packs and KV caches are found by it, so nothing that lies beside a file is believed about it. What was
computed is remembered in a file of our own by path, inode, size and times (`files.Stamp`), so later loads
read nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from tinychat.base import locations
from tinychat.base.errors import CheckpointError, TinychatError
from tinychat.base.files import MappedFile, read_text, write_atomically
from tinychat.base.machine import cpu_count, human_bytes

PIECE = 64 << 20  # bytes that one thread hashes at a time
BLOCK = 4 << 20  # bytes that it holds
SAID = 1 << 30  # bytes from which it takes long enough to be told
MOST = 2000  # files that are remembered
SETTLED = 2.0  # seconds since a file's last change: one more within a tick of the clock would not show

Tell = Callable[[str], None]


def content_hash(file: MappedFile, tell: Tell | None = None) -> str:
    """The hash of the file's content, 64 hex digits: SHA-256 over the size and the SHA-256 of each PIECE.

    Pieces are hashed by several threads (1.6 GB/s each where the processor has instructions for it). tell
    hears of it where that takes long. Raises CheckpointError for a file that changes meanwhile.
    """
    key = str(file.path.resolve())
    known = remembered(file)
    if known is not None:
        return known
    if tell is not None and file.size >= SAID:
        tell(f"Reading {file.path.name} once to know it again ({human_bytes(file.size)})")
    began = time.time_ns()
    digest = computed(file)
    if began - max(file.stamp.modified, file.stamp.changed) >= SETTLED * 1e9:
        _remember(key, [*astuple(file.stamp), digest])
    return digest


def computed(file: MappedFile) -> str:
    """The hash of the file's content, whatever is remembered. Raises CheckpointError where it changes."""
    starts = range(0, file.size, PIECE)
    with ThreadPoolExecutor(max(1, min(cpu_count(), 8, len(starts)))) as pool:
        pieces = list(pool.map(lambda at: _piece(file, at, min(PIECE, file.size - at)), starts))
    file.check_unchanged()
    return hashlib.sha256(b"".join([file.size.to_bytes(8, "little"), *pieces])).hexdigest()


def remembered(file: MappedFile) -> str | None:
    """The hash, if the file is still the one that it was computed of."""
    entry = _known().get(str(file.path.resolve()))
    if isinstance(entry, list) and entry[:-1] == list(astuple(file.stamp)):
        digest = entry[-1]
        return digest if isinstance(digest, str) and len(digest) == 64 else None
    return None


def _piece(file: MappedFile, at: int, size: int) -> bytes:
    digest, end = hashlib.sha256(), at + size
    while at < end:
        block = file.read(at, min(BLOCK, end - at))
        if not block:
            file.check()
            raise CheckpointError(f"{file.path} cannot be read to its end.", "Check the disk that it is on.")
        digest.update(block)
        at += len(block)
    return digest.digest()


def _known() -> dict[str, list]:
    try:
        content = json.loads(read_text(locations.hashes_file()))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}  # it only saves time


def _remember(key: str, entry: list) -> None:
    path = locations.hashes_file()
    with suppress(OSError, TinychatError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _known()
            known.pop(key, None)
            known[key] = entry  # the newest is the last
            if len(known) > MOST:
                known = {k: v for k, v in list(known.items())[-MOST // 2 :] if Path(k).exists()}
            write_atomically(path, json.dumps(known, indent=0).encode())
