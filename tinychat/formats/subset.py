"""Some of a model's layers as a model of their own: a draft that shares the target's embeddings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinychat.base.errors import UsageError
from tinychat.base.files import MappedFile
from tinychat.base.identity import Tell
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_form import Form
from tinychat.network.weights import Linear
from tinychat.text.tokenizer import Tokenizer

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


class LayerSubset:
    """The checkpoint with only the layers `keep`, in that order.

    Raises UsageError if a layer is not there.
    """

    def __init__(self, checkpoint: Checkpoint, keep: Sequence[int]):
        n = checkpoint.config.n_layers
        if not keep or any(not 0 <= i < n for i in keep):
            raise UsageError(
                f"The model has layers 0…{n - 1}; {list(keep)} names others.", "Name some of these."
            )
        self.whole, self.keep = checkpoint, tuple(keep)
        self.path: Path = checkpoint.path
        layers = tuple(checkpoint.config.layers[i] for i in self.keep)
        self.config = replace(checkpoint.config, layers=layers, further=None)

    def has(self, name: str) -> bool:
        """Whether the module exists."""
        return self.whole.has(self._renamed(name))

    def linear(self, name: str) -> Linear:
        """The module of the layer that stands in this one's place."""
        return self.whole.linear(self._renamed(name))

    def stored(self, name: str) -> tuple[Form | str, int]:
        """Likewise."""
        return self.whole.stored(self._renamed(name))

    def vector(self, name: str) -> np.ndarray:
        """Likewise."""
        return self.whole.vector(self._renamed(name))

    def tokenizer(self) -> Tokenizer:
        """The whole model's."""
        return self.whole.tokenizer()

    def fingerprint(self, tell: Tell | None = None) -> str:
        """The whole model's, and which layers."""
        return f"{self.whole.fingerprint(tell)}-layers-{','.join(map(str, self.keep))}"

    def weight_files(self) -> list[MappedFile]:
        """The whole model's."""
        return self.whole.weight_files()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the whole model was changed since it was opened."""
        self.whole.check_unchanged()

    def _renamed(self, name: str) -> str:
        match = _LAYER.fullmatch(name)
        return f"model.layers.{self.keep[int(match[1])]}.{match[2]}" if match else name


def parse_layers(text: str) -> list[int]:
    """ "0-3,26,29" → [0, 1, 2, 3, 26, 29]. Raises UsageError for anything else."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            raise UsageError(f"{text!r} is not a list of layers.", "Write layers:0-3,26,29.")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers
