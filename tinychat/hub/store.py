"""The folder of installed models: what is there, what a name means, pull and remove.

`models/NAME/` holds a model's files and its manifest.json, and appears by one rename, so it is whole or not
there. Unfinished things live beside it under names that begin with a dot: `.parts` (downloads to go on with),
`.staging` (cleared by the next pull of that name) and `.locks`.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.base import locations
from tinychat.base.errors import (
    CheckpointError,
    DownloadError,
    ModelNotFoundError,
    TinychatError,
    UsageError,
    shortage,
)
from tinychat.base.files import read_text
from tinychat.hub import licenses
from tinychat.hub.aliases import Alias, Source, all_aliases, is_repo_id, parse_source
from tinychat.hub.facts import license_of, parameters, quantization

if TYPE_CHECKING:
    from tinychat.hub.verify import Verified

MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    _refuse_bytes(model)
    found = _installed_path(model)
    if found is not None:
        return found
    aliases = all_aliases()
    if model not in aliases:
        local = _local(model)
        if local is not None:
            _refuse_bytes(str(local.resolve()))
            return local
        if not _is_source(model):
            raise not_found(model)
        cached = _hf_cached(model)
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
    return _pull(model)


def is_known(word: str) -> bool:
    """Whether `word` is an alias, or names a model that is on this machine."""
    if _installed_path(word) is not None or word in all_aliases():
        return True
    try:
        path = _local(word)
    except TinychatError:  # a folder without a model
        return False
    return path is not None and (path.is_dir() or path.suffix.lower() == ".gguf")


def is_name(word: str) -> bool:
    """Whether `word` could be a model: an alias, one that is installed, a path, a repo id, a source."""
    if _installed_path(word) is not None or word in all_aliases() or _is_source(word):
        return True
    try:
        return locations.written(word).exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL bytes, ~ of nobody
        return False


def _refuse_bytes(path: str) -> None:
    """The libraries that read models take paths that are text. Raises UsageError for others."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"The name {path} is not UTF-8.", "Rename that file or folder.") from None


def pull(name: str) -> Path:
    """Download `name` unless it is here, whole. Safe beside other pulls of it, and after any interruption.

    What is here is read and compared with what was pulled; a damaged model is pulled again.
    """
    found = _installed_path(name)
    if found is not None:
        return _checked_again(name, found)
    if name not in all_aliases() and not _is_source(name):
        if _local(name) is not None:
            raise UsageError(
                f"{name} is on this machine already.", f"Use it: tinychat run {shlex.quote(name)}"
            )
        raise not_found(name)
    if offline_by_environment():
        raise ModelNotFoundError(
            f"{name} cannot be pulled offline.", "Unset HF_HUB_OFFLINE or TINYCHAT_OFFLINE."
        )
    return _pull(name)


def _checked_again(name: str, path: Path) -> Path:
    """The path of an installed model whose files are what was pulled; else it is pulled again."""
    from tinychat.hub.verify import verify

    folder, say = _folder(name), partial(print, file=sys.stderr, flush=True)
    found = verify(path, _manifest(folder), say)
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
    aside = _aside("damaged", folder.name)
    with _lock(folder.name):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    try:
        path = _pull(name)
    except BaseException:
        if not folder.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return path


def installed() -> list[Installed]:
    """Models that were pulled, by name."""
    root = locations.models_dir()
    if not root.is_dir():
        return []
    found = []
    for folder in sorted(root.iterdir()):
        manifest = _manifest(folder)
        if manifest is None:
            continue
        text = {k: v for k, v in manifest.items() if isinstance(v, str)}
        context = manifest.get("context")
        found.append(
            Installed(
                name=text.get("name", folder.name),
                path=_model_path(folder, manifest),
                size=_size(folder),
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
    from tinychat.network.config import ExpertsConfig

    path = resolve(name, pull=False)
    manifest = _manifest_of(path) or {}
    folder = path if path.is_dir() else path.parent
    checkpoint = open_checkpoint(path)
    cfg, tokenizer = checkpoint.config, checkpoint.tokenizer()
    mlps = [layer.mlp for layer in cfg.layers]
    experts = [f"{m.taken} of {m.n}" for m in mlps if isinstance(m, ExpertsConfig)]
    facts: dict[str, Any] = {
        "name": name,
        "path": str(path),
        "size_bytes": _size(folder) if manifest or path.is_dir() else path.stat().st_size,
        "source": manifest.get("source"),
        "pulled_at": manifest.get("pulled_at"),
        "sha256": manifest.get("sha256"),
        "license": manifest.get("license") or license_of(path, checkpoint),
        "family": cfg.family,
        "quantization": quantization(path, checkpoint),
        "weights": checkpoint.tensor_bytes() if hasattr(checkpoint, "tensor_bytes") else None,
        "parameters": parameters(cfg),
        "layers": cfg.n_layers,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": max(layer.mlp.size for layer in cfg.layers),
        "heads": cfg.n_heads,
        "kv_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "experts": next(iter(experts), None),
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.context_length,
        "rope_theta": cfg.rope and cfg.rope.theta,
        "rope_scaling": cfg.rope and cfg.rope.kind,
        "tied_embeddings": cfg.tie_embeddings,
        "chat_template": tokenizer.chat_template is not None,
        "stop_tokens": [
            tokenizer.token_bytes(i).decode("utf-8", "replace") for i in sorted(tokenizer.eos_ids)
        ],
    }
    return {k: v for k, v in facts.items() if v is not None}


def verify(model: str, tell: Callable[[str], None] | None = None) -> Verified:
    """Read all of a model that is on this machine, and its packs; tell hears what is being read.

    Raises ModelNotFoundError.
    """
    from tinychat.hub.verify import verify

    path = resolve(model, pull=False)
    return verify(path, _manifest_of(path), tell)


def remove(model: str) -> int:
    """Delete an installed model, its packs and what was left of its downloads. Returns the bytes freed.

    Only ever touches tinychat's own folders. Raises ModelNotFoundError, UsageError.
    """
    folder = _folder(model)
    manifest = _manifest(folder) or {}
    if folder.name.startswith(".") or not folder.is_dir():
        if _local(model) is not None:
            raise UsageError(f"{model} is not tinychat's to delete.", "Delete the file or folder yourself.")
        raise not_found(model, [m.name for m in installed()], "tinychat list")
    with _lock(folder.name):
        path = _model_path(folder, manifest)
        freed = _size(folder) + _remove_packs(path)
        if folder.is_symlink():
            folder.unlink()
            return freed
        trash = _aside("staging", folder.name)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
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


def _pull(name: str) -> Path:
    alias = all_aliases().get(name) or Alias((_source(name),), 0)
    from tinychat.hub.transfer import disk_errors

    with disk_errors(locations.models_dir()):
        parts = locations.models_dir() / ".parts"
        parts.mkdir(parents=True, exist_ok=True)
    folder = _folder(name)
    with _lock(folder.name):
        found = _installed_path(name)
        if found is not None:  # another process was faster
            return found
        errors: list[TinychatError] = []
        for source in alias.sources:
            try:
                return _pull_from(source, name, folder, parts, alias.size if not errors else 0)
            except DownloadError as e:
                errors.append(e)
        raise errors[0]


def _pull_from(source: Source, name: str, folder: Path, parts: Path, expect: int) -> Path:
    from tinychat.hub.download import download
    from tinychat.hub.transfer import disk_errors

    staging = _aside("staging", folder.name)
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
            if _manifest(folder) is not None:  # of a model whose files somebody deleted
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
        return _model_path(folder, facts)
    except BaseException as e:
        if not keep or isinstance(e, CheckpointError):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _checked(staging: Path, facts: dict) -> dict:
    """Open what was downloaded, so that nothing unreadable gets installed; what a listing says of it."""
    from tinychat.formats import open_checkpoint

    path = _model_path(staging, facts)
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer()
    said = {"quantization": quantization(path, checkpoint), "context": checkpoint.config.context_length}
    license = facts.get("license") or license_of(path, checkpoint)
    return said | ({"license": license} if license else {})


def _folder(name: str) -> Path:
    """`models/NAME`; a repo id's slash is written `--`, as Hugging Face does. Never outside models_dir."""
    safe = name.partition(":")[2] if name.startswith(("hf:", "pypi:")) else name
    safe = safe.replace("/", "--")
    unusual = any(c in "\\\0" or "\ud800" <= c <= "\udfff" for c in safe)
    if not safe or safe.startswith(".") or unusual or len(safe.encode()) > 200:
        return locations.models_dir() / ".none"
    return locations.models_dir() / safe


def _installed_path(name: str) -> Path | None:
    folder = _folder(name)
    manifest = _manifest(folder)
    if manifest is None or manifest.get("name", folder.name) not in (
        name,
        name.removeprefix("hf:"),
        folder.name,
    ):
        return None
    path = _model_path(folder, manifest)
    return path if path.exists() else None


def _manifest(folder: Path) -> dict | None:
    if folder.name.startswith("."):
        return None
    try:
        content = json.loads(read_text(folder / MANIFEST))
        return content if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def _manifest_of(path: Path) -> dict | None:
    """What we wrote down when we pulled the model at `path`. Anywhere else it is a stranger's claim."""
    folder = path if path.is_dir() else path.parent
    ours = folder.parent.resolve() == locations.models_dir().resolve()
    return _manifest(folder) if ours else None


def _model_path(folder: Path, manifest: dict) -> Path:
    file = manifest.get("file")
    return folder / Path(file).name if isinstance(file, str) and file else folder


def _local(model: str) -> Path | None:
    """An existing path that holds a model; None if there is no such path. Refuses pickles by name."""
    path = locations.written(model)
    try:
        if path.is_file():
            if path.suffix.lower() in PICKLES:
                raise _pickle(path)
            if path.suffix.lower() == ".safetensors":
                raise CheckpointError(
                    f"{path} is only the weights.", "Give the folder that also has config.json."
                )
            return path
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is no regular file and no folder.", "Give the model itself.")
        if not path.is_dir():
            return None
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        if not has_weights:
            from tinychat.formats.tensors import llm_awq_file

            pickles = [f for f in sorted(path.iterdir()) if f.suffix.lower() in PICKLES]
            if pickles and llm_awq_file(path) is None:  # that one is read as plain tensors, or refused
                raise _pickle(pickles[0])
        if has_weights or (path / "config.json").exists():
            return path
        if not model.startswith((".", "/", "~")) and is_repo_id(model):
            return None  # a folder that happens to be called like a repo
        raise ModelNotFoundError(
            f"{path} holds no model.", "Give a .gguf file, or a folder with config.json and *.safetensors."
        )
    except (OSError, ValueError, RuntimeError) as e:  # too long, NUL bytes, not readable, ~ of nobody
        if (short := shortage(e)) is not None:
            raise short from e
        if isinstance(e, PermissionError):
            raise CheckpointError(f"{path} cannot be read: {e.strerror}.", "Check its permissions.") from e
        return None


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run any code when it is opened.",
        "Use the model's *.safetensors or .gguf files instead.",
    )


def _is_source(model: str) -> bool:
    return model.startswith(("hf:", "pypi:", "file:")) or is_repo_id(model)


def _source(model: str) -> Source:
    return parse_source(model if model.startswith(("hf:", "pypi:", "file:")) else f"hf:{model}")


def _hf_cached(model: str) -> Path | None:
    """A repo that another program has downloaded into Hugging Face's own cache."""
    if not is_repo_id(model.removeprefix("hf:")):
        return None
    from tinychat.hub.huggingface import cached

    return cached(_source(model))


def offline_by_environment() -> bool:
    """Whether the user's settings forbid the network."""
    names = ("TINYCHAT_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(n, "").lower() in ("1", "true", "yes", "on") for n in names)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _remove_packs(path: Path) -> int:
    """Delete what backends have made of the model: its packs. Returns the bytes freed."""
    from tinychat.formats import open_checkpoint

    if not locations.packs_dir().is_dir():
        return 0
    try:
        fingerprint = open_checkpoint(path).fingerprint()
    except (TinychatError, OSError):
        return 0
    freed = 0
    for entry in locations.packs_of(fingerprint):
        freed += entry.stat().st_size
        entry.unlink()
    return freed


def _aside(kind: str, name: str) -> Path:
    folder = locations.models_dir() / f".{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if kind == "staging" and target.exists() and not (target / ".cache" / "huggingface").is_dir():
        shutil.rmtree(target)
    return target


@contextmanager
def _lock(name: str) -> Iterator[None]:
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
