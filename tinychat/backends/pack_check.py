"""Looking for rot in packs: at load where that costs nothing, in the background now and then, or all at once.

A small pack is read at load anyway, so it is checked then, every time. A large one is mapped; it is checked
at load if anybody wrote to the file since we did, and else in the background, CHECK_DAYS after it last was
whole. When that was is kept beside the pack, in a file named `….checked`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from tinychat.backends import pack_file
from tinychat.backends.pack_file import Pack
from tinychat.base.errors import TinychatError
from tinychat.base.files import Stamp, read_text, write_atomically
from tinychat.base.machine import cpu_count, human_bytes

CHECK_DAYS = 7
SLICE = 16 << 20  # bytes that are checked at a time in the background
SHARE = 0.1  # of one core, that the check in the background takes
STORE_EVERY = 2.0  # seconds between two notes of how far it is

Tell = Callable[[str], None]


def sound(path: Path, tell: Tell | None = None, at_once: bool = False) -> Pack | None:
    """The pack at `path`, checked as far as it is due; None where there is none, or it is damaged and will be
    made again. at_once: check all of it now.
    """
    if not path.exists():
        return None
    pack = pack_file.read(path)
    if pack is None:
        _give_up(path, ["header"])
        return None
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        stamp, when, done = _noted(path)
        due = time.time() - when > CHECK_DAYS * 86400
        touched = stamp != list(astuple(Stamp.of(path)))
        if size <= pack_file.SMALL or at_once or touched:
            if tell is not None and size > 1 << 30:
                tell(f"Checking the stored weights ({human_bytes(size)})")
            if bad := bad_parts(pack):
                _give_up(path, bad)
                return None
            if size > pack_file.SMALL and (due or touched):
                note(path)
        elif due:
            threading.Thread(target=_watch, args=(path, pack, done), daemon=True).start()
    return pack


def verify(path: Path) -> list[str]:
    """Names of the modules whose bytes do not have the checksum that they were written with. Reads all."""
    pack = pack_file.read(path)
    if pack is None:
        return ["header"]
    bad = bad_parts(pack)
    if not bad and path.stat().st_size > pack_file.SMALL:
        note(path)
    return bad


def bad_parts(pack: Pack) -> list[str]:
    """`Pack.bad_parts` of all parts, by several threads."""
    n = len(pack.index["parts"])
    size = max(1, -(-n // 64))
    with ThreadPoolExecutor(max(1, min(cpu_count(), 8))) as pool:
        found = pool.map(lambda first: pack.bad_parts(first, first + size), range(0, n, size))
        return [name for names in found for name in names]


def note(path: Path, when: float | None = None, done: int = 0) -> None:
    """Remember that the pack is whole as it is now; when, done: since when, and how many parts were checked
    again.
    """
    with contextlib.suppress(OSError, TinychatError):
        if path.stat().st_size > pack_file.SMALL:
            said = [list(astuple(Stamp.of(path))), time.time() if when is None else when, done]
            write_atomically(_note_of(path), json.dumps(said).encode())


def discard(path: Path) -> None:
    """Remove a pack and what is remembered of it."""
    for file in (path, _note_of(path)):
        with contextlib.suppress(OSError):
            file.unlink()


def _give_up(path: Path, bad: list[str]) -> None:
    """Remove a damaged pack, and say so."""
    discard(path)
    warnings.warn(
        f"The stored weights were damaged ({', '.join(bad[:3])}); they are made again.",
        RuntimeWarning,
        stacklevel=2,
    )


def _note_of(path: Path) -> Path:
    return path.with_suffix(".checked")


def _noted(path: Path) -> tuple[list[int] | None, float, int]:
    """The stamp, since when the pack is known to be whole, and the parts that were checked since then."""
    try:
        stamp, when, done = json.loads(read_text(_note_of(path)))
        return list(stamp), float(when), int(done)
    except (OSError, ValueError, TypeError):
        return None, 0.0, 0


def _watch(path: Path, pack: Pack, done: int) -> None:
    """Check the pack slice by slice in SHARE of a core, beginning where an earlier process came to."""
    parts, (_, when, _) = pack.index["parts"], _noted(path)
    stored = time.monotonic()
    while done < len(parts):
        end, size, began = done, 0, time.monotonic()
        while end < len(parts) and (not size or size + parts[end][1] <= SLICE):
            size += parts[end][1]
            end += 1
        if bad := pack.bad_parts(done, end):
            discard(path)
            pack.damaged += bad
            return
        done, now = end, time.monotonic()
        if now - stored > STORE_EVERY:
            stored = now
            note(path, when, done)
        time.sleep((now - began) * (1 / SHARE - 1))
    note(path)
