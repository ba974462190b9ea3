"""Whether a model's files and packs still are what they were when they were written: all of them are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat.backends import pack_check
from tinychat.base import identity, locations
from tinychat.base.errors import CheckpointError, TinychatError
from tinychat.base.files import MappedFile
from tinychat.base.machine import human_bytes
from tinychat.formats import open_weights
from tinychat.formats.eagle import EagleHead
from tinychat.hub.transfer import sha256_of

Tell = Callable[[str], None]


@dataclass
class Verified:
    """Names of the files and packs that were read, and what is wrong with which: one line each."""

    files: list[str] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)
    bad_files: dict[str, str] = field(default_factory=dict)
    bad_packs: dict[str, str] = field(default_factory=dict)


def verify(path: Path, manifest: dict[str, Any] | None = None, tell: Tell | None = None) -> Verified:
    """Read a model's weights and its packs. Damaged packs are removed: the next load makes them again.

    manifest: what we wrote down when we pulled it; without one a file is compared with what it was when it
    was first loaded. tell hears what is being read.
    """
    out = Verified()
    promised = hashes(manifest or {})
    folder = path if path.is_dir() else path.parent
    for name, digest in promised.items():
        file = folder / name
        out.files.append(name)
        try:
            with_size(file, tell)
            if sha256_of(file) != digest:
                out.bad_files[name] = "its content is not what was pulled"
        except OSError as e:
            out.bad_files[name] = e.strerror or str(e)
    try:
        checkpoint = open_weights(path)
        if not isinstance(checkpoint, EagleHead):
            checkpoint.tokenizer()
    except TinychatError as e:
        out.bad_files.setdefault(path.name, e.what)
        return out
    for held in checkpoint.weight_files():
        if held.path.name not in promised:
            out.files.append(held.path.name)
            with_size(held.path, tell)
            if not _as_remembered(held):
                out.bad_files[held.path.name] = "its content changed, and nobody wrote to it"
    if not out.bad_files:
        _verify_packs(checkpoint.fingerprint(), out, tell)
    return out


def with_size(file: Path, tell: Tell | None) -> None:
    """Say that a file is being read, where that takes a while."""
    size = file.stat().st_size
    if tell is not None and size >= 1 << 28:
        tell(f"Reading {file.name} ({human_bytes(size)})")


def hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the weight files that a manifest vouches for, by name."""
    found = manifest.get("hashes")
    found = dict(found) if isinstance(found, dict) else {}
    if isinstance(manifest.get("file"), str):
        found[Path(manifest["file"]).name] = manifest.get("sha256")
    return {n: h for n, h in found.items() if isinstance(h, str) and n == Path(n).name}


def _as_remembered(file: MappedFile) -> bool:
    known = identity.remembered(file)
    try:
        return identity.computed(file) == known or known is None
    except CheckpointError:
        return False


def _verify_packs(fingerprint: str, out: Verified, tell: Tell | None) -> None:
    for pack in locations.packs_of(fingerprint):
        if pack.suffix != ".pack":
            continue
        out.packs.append(pack.name)
        with_size(pack, tell)
        if bad := pack_check.verify(pack):
            out.bad_packs[pack.name] = f"damaged in {', '.join(bad[:3])}"
            pack_check.discard(pack)
