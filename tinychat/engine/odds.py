"""Log-probabilities of the tokens of an answer, and of the likeliest in their places."""

from __future__ import annotations

import numpy as np

from tinychat.base.events import Logprobs

MOST = 20  # likeliest tokens of one place


class Odds:
    """What the model thought of each token when it was chosen: its logits as they are, before any setting."""

    def __init__(self, top: int):
        """top: how many of the likeliest are told beside the chosen one."""
        self._top = top
        self._noted: dict[int, Logprobs] = {}

    def note(self, position: int, row: np.ndarray, token: int) -> None:
        """The token was chosen from a whole row of logits; `told` may be asked for it. Again, after an
        interrupt perhaps: then this holds.
        """
        x = row.astype(np.float64)
        best = x.max()
        x -= best + np.log(np.exp(x - best).sum())
        n = min(self._top, len(x))
        first = np.argpartition(-x, n - 1)[:n] if n else np.zeros(0, np.int64)
        first = first[np.lexsort((first, -x[first]))]
        self._noted[position] = Logprobs(token, float(x[token]), tuple((int(i), float(x[i])) for i in first))

    def told(self, position: int) -> Logprobs | None:
        """What was noted for a position; once."""
        return self._noted.pop(position, None)
