"""What was said before, and what the asker wants, as changes of the next token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinychat.backends.interface import LargestLogits
from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class Penalties:
    """Changes of a row of logits: a bias of single tokens, then the repetition penalty on what the context
    has (CTRL, Keskar et al. 2019), then presence and frequency penalties on what the answer has, as OpenAI's
    API defines them: logit − presence · [count > 0] − frequency · count.

    seen, said   int [vocab]: how often each token is in the context, and in the answer
    """

    params: SamplingParams
    seen: np.ndarray
    said: np.ndarray

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        row: np.ndarray | LargestLogits,
        context: Sequence[int],
        drafts: Sequence[int],
        answer: int,
    ) -> Penalties | None:
        """Those for a row of logits behind a context and drafts, which from index `answer` on are the answer;
        None where there are none.
        """
        if not params.penalizes:
            return None
        vocabulary = row.n if isinstance(row, LargestLogits) else len(row)
        ids = np.concatenate([np.asarray(context, np.int64), np.asarray(drafts, np.int64)])
        return cls(params, *(np.bincount(part, minlength=vocabulary) for part in (ids, ids[answer:])))

    def changed(self, x: np.ndarray, ids: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Logits x (float32) of these tokens, changed; x stays."""
        p = self.params
        if p.logit_bias:
            x = x + _bias(p.logit_bias, len(self.seen))[ids]
        if p.repeat_penalty != 1:
            less = np.where(x > 0, x / p.repeat_penalty, x * p.repeat_penalty)
            x = np.where(self.seen[ids] > 0, less, x)
        if p.presence_penalty or p.frequency_penalty:
            n = self.said[ids]
            x = x - (p.presence_penalty * (n > 0) + p.frequency_penalty * n).astype(np.float32)
        return x


@lru_cache(8)
def _bias(pairs: tuple[tuple[int, float], ...], vocabulary: int) -> np.ndarray:
    """Biases as float32 [vocab]. A draft model's vocabulary may be shorter."""
    out = np.zeros(vocabulary, np.float32)
    for i, bias in pairs:
        if i < vocabulary:
            out[i] = bias
    return out


def check_bias(params: SamplingParams, vocabulary: int) -> SamplingParams:
    """The parameters. Raises UsageError where they name tokens that a model of this vocabulary has not."""
    beyond = [i for i, _ in params.logit_bias if i >= vocabulary]
    if beyond:
        raise UsageError(
            f"logit_bias names the token {beyond[0]}, and the model has {vocabulary:,} tokens.",
            "Leave it out: ids are those of one model's vocabulary.",
        )
    return params
