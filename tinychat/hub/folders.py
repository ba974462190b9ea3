"""Folders of installed models: `models/NAME/`, what is written down beside them, and who may touch them.

`models/NAME/` holds a model's files and its manifest.json, and appears by one rename, so it is whole or not
there. Unfinished things live beside it under names that begin with a dot: `.parts` (downloads to go on with),
`.staging` (cleared by the next pull of that name) and `.locks`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.base.files import read_text

MANIFEST = "manifest.json"


def model_folder(name: str) -> Path:
    """`models/NAME`; a repo id's slash is written `--`, as Hugging Face does. Never outside models_dir."""
    safe = name.partition(":")[2] if name.startswith(("hf:", "pypi:")) else name
    safe = safe.replace("/", "--")
    unusual = any(c in "\\\0" or "\ud800" <= c <= "\udfff" for c in safe)
    if not safe or safe.startswith(".") or unusual or len(safe.encode()) > 200:
        return locations.models_dir() / ".none"
    return locations.models_dir() / safe


def installed_path(name: str) -> Path | None:
    """The folder or .gguf file of an installed model, by any of its names."""
    folder = model_folder(name)
    manifest = manifest_in(folder)
    if manifest is None or manifest.get("name", folder.name) not in (
        name,
        name.removeprefix("hf:"),
        folder.name,
    ):
        return None
    path = model_path(folder, manifest)
    return path if path.exists() else None


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """Manifest that was written when the folder was pulled; None for any other folder."""
    if folder.name.startswith("."):
        return None
    try:
        content = json.loads(read_text(folder / MANIFEST))
        return content if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def manifest_of(path: Path) -> dict[str, Any] | None:
    """Manifest that we wrote when we pulled the model at `path`. Anywhere else it is a stranger's claim."""
    folder = path if path.is_dir() else path.parent
    ours = folder.parent.resolve() == locations.models_dir().resolve()
    return manifest_in(folder) if ours else None


def model_path(folder: Path, manifest: dict[str, Any]) -> Path:
    """The .gguf file that the manifest names, or the folder."""
    file = manifest.get("file")
    return folder / Path(file).name if isinstance(file, str) and file else folder


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def aside(kind: str, name: str) -> Path:
    """A place beside the models for an unfinished or a damaged one; an old one is cleared unless a download
    can go on in it.
    """
    folder = locations.models_dir() / f".{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if kind == "staging" and target.exists() and not (target / ".cache" / "huggingface").is_dir():
        shutil.rmtree(target)
    return target


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time for each model; the lock goes away with its holder, however that ends."""
    folder = locations.models_dir() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another tinychat is busy with {name}; waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
