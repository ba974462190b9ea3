"""Models that make embeddings: folders that sentence-transformers wrote say how a text's last hidden states
become one vector.

Such a model runs as any other of its family, with a head that changes nothing in place of its own: what a
step gives are the final hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.files import MappedFile, read_text
from tinychat.base.identity import Tell
from tinychat.formats.hf import HEAD, HFCheckpoint
from tinychat.formats.tensors import is_there, read_json
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_form import Form
from tinychat.network.weights import DenseLinear, Linear
from tinychat.text.tokenizer import Tokenizer

LONGEST = 1 << 20  # bytes of a file of settings
MODES: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}
_OTHER = "Use a model with mean or last-token pooling, such as Qwen3-Embedding."
_PULL = "Pull the model again."


@dataclass(frozen=True)
class Pooling:
    """How a text becomes a vector.

    mode       "mean" of the hidden states of its tokens, or that of its "last" one
    normalize  to length 1
    prompt     what stands before each text
    lower      texts are read in lower case
    longest    tokens of a text, at most; None: as many as the context holds
    """

    mode: Literal["mean", "last"]
    normalize: bool = False
    prompt: str = ""
    lower: bool = False
    longest: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Pooling | None:
        """What a folder says; None where it is no embedding model's.

        Raises UnsupportedModelError for what is not known, by name, and CheckpointError for damaged files.
        """
        if not is_there(folder / "modules.json"):
            return None
        kinds: dict[str, str] = {}
        for module in _modules(folder / "modules.json"):
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize") or kind in kinds:
                raise UnsupportedModelError(
                    f"{folder.name} has a module {kind[:40]!r} of embeddings.", _OTHER
                )
            kinds[kind] = str(module.get("path", ""))
        if list(kinds)[:2] != ["Transformer", "Pooling"] or kinds["Transformer"] not in ("", "."):
            raise UnsupportedModelError(f"{folder.name} does not pool a model's hidden states.", _OTHER)
        below = kinds["Pooling"]
        if not below or Path(below).name != below:
            raise CheckpointError(
                f"{folder.name} has its pooling in {below[:40]!r}, no folder of its own.", _PULL
            )
        said = read_json(folder / below / "config.json")
        if said is None:
            raise CheckpointError(f"{folder.name} lacks {below}/config.json.", _PULL)
        mode = _mode(folder.name, said)
        shape = read_json(folder / "sentence_bert_config.json") or {}
        longest = shape.get("max_seq_length")
        return cls(
            mode,
            "Normalize" in kinds,
            _prompt(folder),
            shape.get("do_lower_case") is True,
            longest if type(longest) is int and longest > 0 else None,
        )


def _modules(path: Path) -> list[Mapping[str, Any]]:
    try:
        modules = json.loads(read_text(path, LONGEST))
    except OSError as e:
        raise CheckpointError(f"{path.name} cannot be read: {e.strerror or e}.", _PULL) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path.name} cannot be read: {e}.", _PULL) from e
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{path.name} is not a list of modules.", _PULL)
    return modules


def _mode(name: str, said: Mapping[str, Any]) -> Literal["mean", "last"]:
    modes = [k.removeprefix("pooling_mode_").removesuffix("_tokens") for k, on in said.items()
             if k.startswith("pooling_mode_") and on is True]  # fmt: skip
    if isinstance(said.get("pooling_mode"), str):
        modes = [said["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in MODES:
        raise UnsupportedModelError(
            f"{name} pools by {', '.join(modes)[:60] or 'nothing that is known'}.", _OTHER
        )
    return MODES[modes[0]]


def _prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before each text unless it is told another one."""
    said = read_json(folder / "config_sentence_transformers.json") or {}
    prompts, name = said.get("prompts"), said.get("default_prompt_name")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else ""


class EmbeddingCheckpoint:
    """The checkpoint with a head that gives the hidden states as they are; implements `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, pooling: Pooling):
        self.whole, self.pooling = checkpoint, pooling
        self.path: Path = checkpoint.path
        self.config = replace(checkpoint.config, tie_embeddings=False, logit_scale=1.0, logit_soft_cap=0.0)
        self.n_outputs = self.config.hidden_size  # of a row, in place of logits

    def has(self, name: str) -> bool:
        """Whether the module exists."""
        return name == HEAD or self.whole.has(name)

    def linear(self, name: str) -> Linear:
        """A linear module; the head is the identity."""
        if name == HEAD:
            return DenseLinear(np.eye(self.n_outputs, dtype=np.float32))
        return self.whole.linear(name)

    def stored(self, name: str) -> tuple[Form | str, int]:
        """Form and bytes of a linear."""
        return (Form(32, "fp32"), 4 * self.n_outputs**2) if name == HEAD else self.whole.stored(name)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or another vector."""
        return self.whole.vector(name)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.whole.tokenizer()

    def fingerprint(self, tell: Tell | None = None) -> str:
        """The whole model's, and that it has another head."""
        return f"{self.whole.fingerprint(tell)}-embeds"

    def weight_files(self) -> list[MappedFile]:
        """The whole model's."""
        return self.whole.weight_files()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the model was changed since it was opened."""
        self.whole.check_unchanged()


def for_embeddings(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as what makes embeddings, if its folder says that it does. Raises as `Pooling.of`."""
    if not isinstance(checkpoint, HFCheckpoint):
        return checkpoint
    pooling = Pooling.of(checkpoint.path)
    if pooling is None:
        return checkpoint
    if checkpoint.json.get("is_causal") is False:
        raise UnsupportedModelError(f"{checkpoint.path.name} lets tokens see those behind them.", _OTHER)
    return EmbeddingCheckpoint(checkpoint, pooling)
