"""Embeddings of texts, by a model whose folder says how its hidden states become one vector."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinychat.base import arguments
from tinychat.base.errors import UsageError
from tinychat.text.oversized import refuse_oversized
from tinychat.text.tokenizer_file import guarded

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.formats.embedder import Pooling

MOST = 2048  # texts of one request


@dataclass(frozen=True)
class Embedded:
    """The vector of one text, float32 [dimensions], and how many tokens the text has."""

    vector: np.ndarray
    tokens: int


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts that are made into vectors, by their ids. dimensions: the first so many of each; None: all."""

    pooling: Pooling
    prompts: list[list[int]]
    dimensions: int | None = None

    @classmethod
    def of(
        cls, model: ChatModel, pooling: Pooling, texts: Sequence[str | list[int]], dimensions: int | None
    ) -> EmbeddingRequest:
        """Raises UsageError for what is wrong."""
        if not 0 < len(texts) <= MOST:
            raise UsageError(f"{len(texts)} texts are given.", f"Give 1 to {MOST:,} at once.")
        if dimensions is not None:
            arguments.integer("dimensions", dimensions, 1, model.config.hidden_size)
        prompts = [_ids(model, pooling, text) for text in texts]
        most = min(model.n_ctx, pooling.longest or model.n_ctx)
        if (longest := max(map(len, prompts))) > most:
            raise UsageError(
                f"A text has {longest:,} tokens, and the context holds {most:,}.", "Cut it into shorter ones."
            )
        return cls(pooling, prompts, dimensions)

    def events(self, model: ChatModel, cancel: threading.Event | None = None) -> Iterator[Embedded]:
        """One after the other. cancel: set by any thread, it ends them between two."""
        for ids in self.prompts:
            if cancel is not None and cancel.is_set():
                return
            states = model.engine.logits(ids)
            vector = states[-1] if self.pooling.mode == "last" else states.mean(0)
            vector = vector[: self.dimensions]
            if self.pooling.normalize:
                vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
            yield Embedded(vector.astype(np.float32), len(ids))


def _ids(model: ChatModel, pooling: Pooling, text: str | list[int]) -> list[int]:
    """Ids of a text with what the model's tokenizer puts around it; markers that it spells are plain text."""
    if isinstance(text, list):
        return arguments.token_ids(text, model.config.vocab_size)
    arguments.text("A text", text)
    text = pooling.prompt + (text.lower() if pooling.lower else text)
    tokenizer = model.tokenizer
    refuse_oversized(tokenizer, [text], model.n_ctx, False)
    with tokenizer.lock:
        tokenizer.backend.encode_special_tokens = True
        ids = guarded(tokenizer.backend.encode, text).ids
    if not ids or not tokenizer.knows(ids):
        raise UsageError("A text has no tokens that the model knows.", "Leave it out.")
    return ids
