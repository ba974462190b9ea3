"""Checkpoint readers: a folder or file on disk becomes a config, linears, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

from tinychat.base.errors import ModelNotFoundError
from tinychat.network.checkpoint import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """The reader for `path`: a .gguf file, or a folder in Hugging Face layout (or with one .gguf inside)."""
    from tinychat.formats.eagle import is_head, refuse
    from tinychat.formats.gguf import GGUFCheckpoint
    from tinychat.formats.hf import HFCheckpoint
    from tinychat.formats.tensors import read_json

    if path.exists() and not path.is_dir():
        return GGUFCheckpoint(path)
    if (path / "config.json").exists():
        if is_head(read_json(path / "config.json") or {}):
            raise refuse(path.name)
        checkpoint = HFCheckpoint(path)
        checkpoint.check_complete()
        return checkpoint
    files = sorted(path.glob("*.gguf"))
    if files:
        return GGUFCheckpoint(files[0])
    raise ModelNotFoundError(
        f"{path} holds no model.", "Give a .gguf file, or a folder with config.json and *.safetensors."
    )


def open_weights(path: Path) -> Checkpoint:
    """The reader for `path`, be it a model or a head that drafts for one, which has no tokenizer."""
    from tinychat.formats.eagle import head_in

    return head_in(path) or open_checkpoint(path)
