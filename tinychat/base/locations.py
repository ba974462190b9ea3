"""Places where tinychat keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def written(text: str) -> Path:
    """A path as people write it: ~ is their home; the ~name of nobody stays as it is."""
    try:
        return Path(os.path.expanduser(text))
    except ValueError:  # a name that nobody can have: a NUL, or characters that the system's encoding lacks
        return Path(text)


def home() -> Path:
    """`TINYCHAT_HOME`, or the platform's data folder. Not created here."""
    override = os.environ.get("TINYCHAT_HOME")
    return written(override) if override else Path(platformdirs.user_data_dir("tinychat"))


def config_file() -> Path:
    """The user's own settings (`tinychat.base.preferences`): with everything else where `TINYCHAT_HOME` is
    set, and else in the platform's folder for such files.
    """
    override = os.environ.get("TINYCHAT_HOME")
    folder = written(override) if override else Path(platformdirs.user_config_dir("tinychat"))
    return folder / "config.toml"


def models_dir() -> Path:
    """One folder a pulled model."""
    return home() / "models"


def kv_file(chat: str) -> Path:
    """File in which the KV cache of a chat is kept."""
    return home() / "kv" / f"{chat}.safetensors"


def packs_dir() -> Path:
    """Weights in a backend's own layout, made at first load and memory-mapped afterwards."""
    return home() / "packs"


def hashes_file() -> Path:
    """Content hashes of model files that were read here (`tinychat.base.identity`)."""
    return home() / "hashes.json"


def kernels_dir() -> Path:
    """CUDA kernels, compiled for the GPU that is here."""
    return home() / "kernels"


def gpu_check_file() -> Path:
    """What the self-check of the GPU came to."""
    return home() / "gpu-check.json"


def pack_name(fingerprint: str, rest: str = "") -> str:
    """How the names of a checkpoint's packs begin, and go on."""
    return "".join(c if c.isalnum() else "-" for c in fingerprint)[:80] + "--" + rest


def packs_of(fingerprint: str) -> list[Path]:
    """The packs of a checkpoint and of its layers, and what lies beside them."""
    beginning = pack_name(fingerprint).removesuffix("-")
    return sorted(packs_dir().glob(f"{beginning}*")) if packs_dir().is_dir() else []
