"""Two exact rules for which drafts to keep. Either way the text is distributed exactly as the target alone
would have it.

coupled    the target's token at a position is argmax(log p + noise(seed, position)); a draft stands when it
           is that token.
           With a seed the text is the same with and without a draft.
rejection  accept with probability min(1, p/q), else draw from the normalised max(0, p − q)
           (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).
"""

from __future__ import annotations

import numpy as np

from tinychat.backends.interface import LargestLogits
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, candidates, gumbel, sample

_ACCEPT, _RESIDUAL = 0x2545F4914F6CDD1D, 0x9E6C63D0876A9A47  # noise streams of their own


def rejection(
    logits: np.ndarray | LargestLogits,
    drafted: int,
    q: tuple[np.ndarray, np.ndarray] | None,
    params: SamplingParams,
    seed: int,
    position: int,
    penalties: Penalties | None,
) -> int:
    """The token for `position`: `drafted` if it is accepted, else one from the residual.

    q: (ids, probabilities) that the draft was drawn from; None puts all of it on `drafted`.
    """
    if params.temperature == 0:
        return sample(logits, params, seed, position, penalties)
    ids, p = candidates(logits, params, penalties)
    q_ids, q_p = (np.array([drafted]), np.array([1.0])) if q is None else q
    q_of = dict(zip(q_ids.tolist(), q_p.tolist(), strict=True))
    p_of = dict(zip(ids.tolist(), p.tolist(), strict=True))
    if uniform(seed ^ _ACCEPT, position) * q_of[drafted] < p_of.get(drafted, 0.0):
        return drafted
    residual = np.maximum(0.0, p - np.array([q_of.get(i, 0.0) for i in ids.tolist()]))
    with np.errstate(divide="ignore"):
        return int(ids[np.argmax(np.log(residual) + gumbel(seed ^ _RESIDUAL, position, ids))])


def uniform(seed: int, position: int) -> float:
    """A uniform number in (0, 1) for one position: the Gumbel noise of id 0, through its distribution
    function.
    """
    return float(np.exp(-np.exp(-gumbel(seed, position, np.zeros(1, dtype=np.int64))[0])))
