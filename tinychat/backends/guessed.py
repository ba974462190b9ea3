"""What a layer that predicts further gives for some token ids, as logits or a choice of all of them."""

from __future__ import annotations

import numpy as np


def spread(logits: np.ndarray, vocab: int, ids: np.ndarray | None) -> np.ndarray:
    """Logits of some ids among those of all, which get minus infinity: float32 [rows, vocab].

    logits: [rows, n]. ids: which these are, int64 [n]; None: the first.
    """
    if ids is None and logits.shape[1] == vocab:
        return logits
    out = np.full((len(logits), vocab), -np.inf, np.float32)
    out[:, slice(logits.shape[1]) if ids is None else ids] = logits
    return out


def named(chosen: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """Token ids that were chosen by their place among `ids`: int32 [rows]; -1 stays."""
    return chosen if ids is None else np.where(chosen < 0, -1, ids[chosen]).astype(np.int32)
