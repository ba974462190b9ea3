"""The models of this machine: what a name means, what is there, pull and remove."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.base import locations
from tinychat.base.errors import ModelNotFoundError, TinychatError, UsageError
from tinychat.hub.aliases import all_aliases
from tinychat.hub.facts import described, license_of
from tinychat.hub.folders import (
    aside,
    installed_path,
    locked,
    manifest_in,
    manifest_of,
    model_folder,
    model_path,
    size_of,
)
from tinychat.hub.installing import check_again, install, offline_by_environment
from tinychat.hub.names import hf_cached, is_source, local, refuse_bytes

if TYPE_CHECKING:
    from tinychat.hub.verify import Verified


@dataclass(frozen=True)
class Installed:
    """A model on this machine. size in bytes; quantization and context as recorded when it was pulled."""

    name: str
    path: Path
    size: int
    source: str | None = None
    quantization: str | None = None
    context: int | None = None
    pulled_at: str | None = None


def resolve(model: str, *, offline: bool = False, pull: bool = True) -> Path:
    """The folder or .gguf file of `model`: an alias, a Hugging Face repo id, a source (`hf:…`), or a path.

    Models that are not here are pulled, unless offline (or HF_HUB_OFFLINE, TINYCHAT_OFFLINE) or pull=False.
    Raises ModelNotFoundError with close matches, CheckpointError for pickles, and what `pull` raises.
    """
    refuse_bytes(model)
    found = installed_path(model)
    if found is not None:
        return found
    aliases = all_aliases()
    if model not in aliases:
        here = local(model)
        if here is not None:
            refuse_bytes(str(here.resolve()))
            return here
        if not is_source(model):
            raise not_found(model)
        cached = hf_cached(model)
        if cached is not None:
            return cached
    if offline or offline_by_environment():
        raise ModelNotFoundError(
            f"{model} is not on this machine, and tinychat is offline.",
            f"Go online once and run: tinychat pull {shlex.quote(model)}",
        )
    if not pull:
        raise ModelNotFoundError(
            f"{model} is not on this machine.", f"Get it with: tinychat pull {shlex.quote(model)}"
        )
    return install(model)


def is_known(word: str) -> bool:
    """Whether `word` is an alias, or names a model that is on this machine."""
    if installed_path(word) is not None or word in all_aliases():
        return True
    try:
        path = local(word)
    except TinychatError:  # a folder without a model
        return False
    return path is not None and (path.is_dir() or path.suffix.lower() == ".gguf")


def is_name(word: str) -> bool:
    """Whether `word` could be a model: an alias, one that is installed, a path, a repo id, a source."""
    if installed_path(word) is not None or word in all_aliases() or is_source(word):
        return True
    try:
        return locations.written(word).exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL bytes, ~ of nobody
        return False


def pull(name: str) -> Path:
    """Download `name` unless it is here, whole. Safe beside other pulls of it, and after any interruption.

    What is here is read and compared with what was pulled; a damaged model is pulled again.
    """
    found = installed_path(name)
    if found is not None:
        return check_again(name, found)
    if name not in all_aliases() and not is_source(name):
        if local(name) is not None:
            raise UsageError(
                f"{name} is on this machine already.", f"Use it: tinychat run {shlex.quote(name)}"
            )
        raise not_found(name)
    if offline_by_environment():
        raise ModelNotFoundError(
            f"{name} cannot be pulled offline.", "Unset HF_HUB_OFFLINE or TINYCHAT_OFFLINE."
        )
    return install(name)


def installed() -> list[Installed]:
    """Models that were pulled, by name."""
    root = locations.models_dir()
    if not root.is_dir():
        return []
    found = []
    for folder in sorted(root.iterdir()):
        manifest = manifest_in(folder)
        if manifest is None:
            continue
        text = {k: v for k, v in manifest.items() if isinstance(v, str)}
        context = manifest.get("context")
        found.append(
            Installed(
                name=text.get("name", folder.name),
                path=model_path(folder, manifest),
                size=size_of(folder),
                source=text.get("source"),
                quantization=text.get("quantization"),
                context=context if isinstance(context, int) else None,
                pulled_at=text.get("pulled_at"),
            )
        )
    return found


def known_names() -> list[str]:
    """Aliases and installed models, for completion and suggestions."""
    return sorted({*all_aliases(), *(m.name for m in installed())})


def show(name: str) -> dict[str, Any]:
    """Facts about a model on this machine: an installed name, a folder or a .gguf file.

    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError.
    """
    from tinychat.formats import open_checkpoint

    path = resolve(name, pull=False)
    manifest = manifest_of(path) or {}
    folder = path if path.is_dir() else path.parent
    checkpoint = open_checkpoint(path)
    files = checkpoint.weight_files()
    facts: dict[str, Any] = {
        "name": name,
        "path": str(path),
        "size_bytes": size_of(folder) if manifest or path.is_dir() else sum(f.size for f in files),
        "parts": len(files) if len(files) > 1 and path.suffix == ".gguf" else None,
        "source": manifest.get("source"),
        "pulled_at": manifest.get("pulled_at"),
        "sha256": manifest.get("sha256"),
        "license": manifest.get("license") or license_of(path, checkpoint),
    } | described(path, checkpoint)
    return {k: v for k, v in facts.items() if v is not None}


def verify(model: str, tell: Callable[[str], None] | None = None) -> Verified:
    """Read all of a model that is on this machine, and its packs; tell hears what is being read.

    Raises ModelNotFoundError.
    """
    from tinychat.hub.verify import verify

    path = resolve(model, pull=False)
    return verify(path, manifest_of(path), tell)


def remove(model: str) -> int:
    """Delete an installed model, its packs and what was left of its downloads. Returns the bytes freed.

    Only ever touches tinychat's own folders. Raises ModelNotFoundError, UsageError.
    """
    folder = model_folder(model)
    manifest = manifest_in(folder) or {}
    if folder.name.startswith(".") or not folder.is_dir():
        if local(model) is not None:
            raise UsageError(f"{model} is not tinychat's to delete.", "Delete the file or folder yourself.")
        raise not_found(model, [m.name for m in installed()], "tinychat list")
    with locked(folder.name):
        path = model_path(folder, manifest)
        freed = size_of(folder) + _remove_packs(path)
        if folder.is_symlink():
            folder.unlink()
            return freed
        trash = aside("staging", folder.name)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
        return freed


def _remove_packs(path: Path) -> int:
    """Delete what backends have made of the model: its packs. Returns the bytes freed."""
    from tinychat.formats import open_weights

    if not locations.packs_dir().is_dir():
        return 0
    try:
        fingerprint = open_weights(path).fingerprint()
    except (TinychatError, OSError):
        return 0
    freed = 0
    for entry in locations.packs_of(fingerprint):
        freed += entry.stat().st_size
        entry.unlink()
    return freed


def not_found(model: str, names: list[str] | None = None, listing: str = "tinychat list --all"):
    """ModelNotFoundError with the nearest known names."""
    near = difflib.get_close_matches(
        model.lower(), names if names is not None else known_names(), n=3, cutoff=0.5
    )
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    shown = model if len(model) <= 80 else model[:77] + "…"
    tried = "no alias, installed model, file or folder is called so, and a repo id is OWNER/NAME"
    what = f"There is no model {shown!r}: {tried}." if names is None else f"No model {shown!r} is installed."
    return ModelNotFoundError(what, f"{hint}All names: {listing}")
