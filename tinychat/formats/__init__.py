"""Checkpoint readers: a folder or file on disk becomes a config, linears, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from tinychat.config import ModelConfig
from tinychat.errors import ModelNotFoundError
from tinychat.tokenizer import Tokenizer
from tinychat.weights import Linear


class Checkpoint(Protocol):
    """What every reader gives. Names are Hugging Face's (`model.layers.0.self_attn.q_proj`), without
    `.weight`.

    Modules are read one at a time, when asked for, so that loading never holds the whole model twice.
    """

    path: Path
    config: ModelConfig

    def has(self, name: str) -> bool:
        """Whether the module exists (`lm_head` of a tied model may not)."""
        ...

    def linear(self, name: str) -> Linear:
        """A linear module, or the embedding (rows are token ids), in the kind it is stored in."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or another vector: float32 [n]."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its special tokens, stop tokens and chat template."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the content does: keys packs and prefix indexes."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """The reader for `path`: a .gguf file, or a folder in Hugging Face layout (or with one .gguf inside)."""
    from tinychat.formats.gguf import GGUFCheckpoint
    from tinychat.formats.hf import HFCheckpoint

    if path.is_file():
        return GGUFCheckpoint(path)
    if (path / "config.json").is_file():
        return HFCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if files:
        return GGUFCheckpoint(files[0])
    raise ModelNotFoundError(
        f"{path} holds no model.", "Give a .gguf file, or a folder with config.json and *.safetensors."
    )
