"""Prompt lookup: what followed the last time these tokens occurred in this conversation (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.engine.guide import Guide
from tinychat.engine.memory.branch import Branch
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation import Draft


class PromptLookup:
    """Longest suffix match over n-grams of MIN…MAX tokens, the latest occurrence first.

    It searches the last WITHIN tokens anew each time: some fifty microseconds, and a conversation without an
    end needs no index that grows with it.
    """

    name, slow = "ngram", False
    MIN, MAX = 2, 8  # `_find` begins with pairs
    WITHIN = 32_768

    def begin(self, context: Sequence[int], branch: Branch) -> None:
        """Nothing is remembered between calls."""

    def propose(
        self,
        context: Sequence[int],
        k: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None = None,
    ) -> Draft:
        """Tokens that followed the longest suffix of `context` that occurred before; chained if it runs into
        the end.
        """
        ids = np.asarray(context[-self.WITHIN :], dtype=np.int32)
        at = self._find(ids)
        if at is None:
            return Draft([])
        # Past the end of what is known the match continues in what it just proposed (a loop repeats itself).
        return Draft(np.resize(ids[at : at + k], k).tolist())

    def _find(self, ids: np.ndarray) -> int | None:
        """Index at which what followed the suffix begins. Its follower is known, so the suffix never finds
        itself.
        """
        follows = np.flatnonzero((ids[1:-1] == ids[-1:]) & (ids[:-2] == ids[-2:-1])) + 2
        found = None
        for n in range(self.MIN + 1, self.MAX + 2):
            if not len(follows):
                break
            found = int(follows[-1])
            follows = follows[follows >= n]
            follows = follows[ids[follows - n] == ids[-n]]
        return found
