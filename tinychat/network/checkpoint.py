"""Contract of a model's files, whatever their format: its config, its weights, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from tinychat.base.files import MappedFile
from tinychat.base.identity import Tell
from tinychat.network.config import ModelConfig
from tinychat.network.weight_form import Form
from tinychat.network.weights import Linear
from tinychat.text.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """Contract of every reader. Names are Hugging Face's (`model.layers.0.self_attn.q_proj`), without
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

    def stored(self, name: str) -> tuple[Form | str, int]:
        """Form in which a linear or the embedding is stored (a name, where `Form` has no words for it), and
        its bytes. Reads no weights.
        """
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or another vector: float32 [n]."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its special tokens, stop tokens and chat template."""
        ...

    def fingerprint(self, tell: Tell | None = None) -> str:
        """A hash of all that decides what the weights are, computed here: packs and KV caches are found by
        it.

        `tell` hears of it where that takes long. Raises CheckpointError for files that change meanwhile.
        """
        ...

    def weight_files(self) -> list[MappedFile]:
        """The files that hold the weights."""
        ...

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file was written since it was opened."""
        ...
