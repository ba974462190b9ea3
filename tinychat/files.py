"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from tinychat.errors import TinychatError


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename. On failure the old file is as it was.

    Raises TinychatError when the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(e, OSError):
            todo = "Free some space." if e.errno == errno.ENOSPC else "Choose a folder that you can write to."
            raise TinychatError(f"Cannot write {path}: {e.strerror}.", todo) from e
        raise
