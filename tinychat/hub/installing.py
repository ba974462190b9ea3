"""Putting a model into its folder, from the first source that has it: whole or not at all."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.base.errors import CheckpointError, DownloadError, TinychatError
from tinychat.hub import licenses
from tinychat.hub.aliases import Alias, Source, all_aliases
from tinychat.hub.facts import license_of, quantization
from tinychat.hub.folders import (
    MANIFEST,
    aside,
    installed_path,
    locked,
    manifest_in,
    model_folder,
    model_path,
)
from tinychat.hub.names import source_of


def install(name: str) -> Path:
    """Download a model from the first of its sources that has it; where it lies. Raises DownloadError."""
    alias = all_aliases().get(name) or Alias((source_of(name),), 0)
    from tinychat.hub.transfer import disk_errors

    with disk_errors(locations.models_dir()):
        parts = locations.models_dir() / ".parts"
        parts.mkdir(parents=True, exist_ok=True)
    folder = model_folder(name)
    with locked(folder.name):
        found = installed_path(name)
        if found is not None:  # another process was faster
            return found
        errors: list[TinychatError] = []
        for source in alias.sources:
            try:
                return _install_from(source, name, folder, parts, alias.size if not errors else 0)
            except DownloadError as e:
                errors.append(e)
        raise errors[0]


def _install_from(source: Source, name: str, folder: Path, parts: Path, expect: int) -> Path:
    from tinychat.hub.download import download
    from tinychat.hub.transfer import disk_errors

    staging = aside("staging", folder.name)
    keep = source.kind == "hf"  # huggingface_hub goes on inside its target folder
    try:
        with disk_errors(staging):
            staging.mkdir(parents=True, exist_ok=True)
        facts = download(source, staging, parts, expect=expect)
        facts = {"name": name, "source": str(source), **facts, **_checked(staging, facts)}
        facts["pulled_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with disk_errors(staging):
            with (staging / MANIFEST).open("w", encoding="utf-8") as f:
                json.dump(facts, f, indent=2, ensure_ascii=False)
                f.flush()
                os.fsync(f.fileno())
            if manifest_in(folder) is not None:  # of a model whose files somebody deleted
                shutil.rmtree(folder)
            if folder.is_dir() and any(folder.iterdir()):
                raise DownloadError(
                    f"{folder} is in the way: it has no manifest of tinychat's.",
                    f"Move it away, or delete it: tinychat rm {shlex.quote(name)}",
                )
            os.replace(staging, folder)
        if licenses.has_terms(facts.get("license")):
            said = licenses.notice(name, facts["license"], facts.get("license_link"), folder)
            print(said, file=sys.stderr, flush=True)
        return model_path(folder, facts)
    except BaseException as e:
        if not keep or isinstance(e, CheckpointError):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _checked(staging: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Open what was downloaded, so that nothing unreadable gets installed; what a listing says of it."""
    from tinychat.formats import open_weights
    from tinychat.formats.eagle import EagleHead

    path = model_path(staging, facts)
    checkpoint = open_weights(path)
    said: dict[str, Any] = {"quantization": quantization(path, checkpoint)}
    if not isinstance(checkpoint, EagleHead):
        checkpoint.tokenizer()
        said["context"] = checkpoint.config.context_length
    license = facts.get("license") or license_of(path, checkpoint)
    return said | ({"license": license} if license else {})


def check_again(name: str, path: Path) -> Path:
    """The path of an installed model whose files are what was pulled; else it is pulled again."""
    from tinychat.hub.verify import verify

    folder, say = model_folder(name), partial(print, file=sys.stderr, flush=True)
    found = verify(path, manifest_in(folder), say)
    for pack, what in found.bad_packs.items():
        say(f"The stored weights {pack} are {what}; the next load makes them again.")
    if not found.bad_files:
        return path
    damage = "; ".join(f"{file}: {what}" for file, what in found.bad_files.items())
    if offline_by_environment():
        raise CheckpointError(
            f"{name} is damaged on disk ({damage}).", f"Go online and run: tinychat pull {name}"
        )
    say(f"{name} is damaged on disk ({damage}); it is pulled again.")
    kept = aside("damaged", folder.name)
    with locked(folder.name):
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(folder, kept)
    try:
        path = install(name)
    except BaseException:
        if not folder.exists():
            os.replace(kept, folder)
        raise
    shutil.rmtree(kept, ignore_errors=True)
    return path


def offline_by_environment() -> bool:
    """Whether the user's settings forbid the network."""
    names = ("TINYCHAT_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(n, "").lower() in ("1", "true", "yes", "on") for n in names)
