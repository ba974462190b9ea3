"""Perplexity of a text: windows of the context, the second half of each scored, so every scored token has
context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tinychat.base.errors import UsageError
from tinychat.engine.sampling import log_softmax, no_finite_logit


def perplexity(
    logits: Callable[[Sequence[int]], np.ndarray],
    ids: Sequence[int],
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """exp of the mean negative log-probability of the scored tokens, and how many they are.

    logits: token ids [n] → float32 [n, vocab]. ids: the text. The text is cut into windows of `window`
    tokens; of each, the tokens from `window // 2` on are scored, as llama.cpp's perplexity tool does. A text
    shorter than two windows' worth is scored as one window. Raises UsageError if there is nothing to score,
    CheckpointError if the model computes NaN.
    """
    if window < 4:
        raise UsageError(f"A window of {window} tokens is too small.", "Use a larger --ctx, or leave it out.")
    starts = list(range(0, len(ids) - window + 1, window)) or [0]
    total, n = 0.0, 0
    for done, start in enumerate(starts):
        part = np.asarray(ids[start : start + window])
        first = max(1, len(part) // 2)
        if len(part) <= first:
            continue
        log_p = log_softmax(logits(part.tolist())[first - 1 : -1])
        total -= log_p[np.arange(len(log_p)), part[first:]].sum()
        n += len(part) - first
        if progress:
            progress(done + 1, len(starts))
    if n == 0:
        raise UsageError(f"The text has {len(ids)} tokens, too few to score.", "Give a longer text.")
    if not np.isfinite(total):
        raise no_finite_logit()
    return float(np.exp(total / n)), n
