"""From logits to a token: penalties, temperature, top-k, top-p, min-p, then Gumbel-max with counter-based
noise.

The noise for a candidate depends on (seed, position, token id) only, so the same seed gives the same text,
however the tokens were computed; with a draft model both sides draw with the same noise (the coupled rule of
docs/design.md).
"""

from __future__ import annotations

import numpy as np

from tinychat.backends.interface import LargestLogits
from tinychat.base.errors import CheckpointError, UsageError
from tinychat.base.sampling_params import SamplingParams
from tinychat.engine.penalties import Penalties

FEW = 1024  # of a row's largest logits: nearly always all that top-p and min-p leave
GROUP = 32  # numbers of a row of which only the largest is looked at first


_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014), on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Gumbel(0, 1) noise for the candidates `ids` (int [n]) of one position: float64 [n], a pure function."""
    key = _mix(np.array([(seed * 0x9E3779B97F4A7C15 + 1) & _MASK], dtype=np.uint64))
    key = _mix(key ^ np.array([(position * 0xD1B54A32D192ED03 + 2) & _MASK], dtype=np.uint64))
    bits = _mix(_mix(ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key) ^ key)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def candidates(
    logits: np.ndarray | LargestLogits, params: SamplingParams, penalties: Penalties | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The filtered distribution: (ids int64 [n], probabilities float64 [n], which sum to 1), best first.

    logits: float32 [vocab], or the largest of them: the result has the same bits.
    penalties: changes of the logits, where params have some.
    Order as in transformers: penalties, temperature, top-k, top-p, min-p. Raises UsageError at temperature 0.
    """
    if params.temperature == 0:
        raise UsageError("Temperature 0 has no distribution.", "Use argmax.")
    if isinstance(logits, LargestLogits):
        decided = _of_largest(logits, params, penalties)
        if decided is not None:
            return decided
        logits = logits.whole()
    x, n = penalize(logits, penalties), len(logits)
    if not params.top_k and n > FEW and largest_suffice(params):  # to sort them all takes milliseconds
        ids, params = _order(x, FEW), params.without_penalties()
        with np.errstate(over="ignore"):
            total = np.exp((x.astype(np.float64) - x[ids[0]]) / params.temperature).sum()
        decided = _of_largest(LargestLogits(ids, x[ids], n, float(total), lambda: x), params, None)
        if decided is not None:
            return decided
    ids = _order(x, min(params.top_k or n, n))
    return _filtered(ids, x[ids], params)


def _order(x: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest, best first; the lowest id first among equals."""
    ids = _near_the_top(x, k)
    if k < len(ids):
        # Every id equal to the k-th is a candidate for the cut, so take the lowest ids.
        values = x[ids]
        edge = np.partition(values, len(ids) - k)[len(ids) - k]
        above, level = ids[values > edge], ids[values == edge]
        ids = np.concatenate([above, level[: k - len(above)]])
    return ids[np.lexsort((ids, -x[ids]))]


def _near_the_top(x: np.ndarray, k: int) -> np.ndarray:
    """Ids, ascending, with the k largest and all that equal one of them, and a few more.

    The row is cut into groups. Of the k groups with the largest maxima each has a number that is no less than
    the k-th maximum, so nothing below that can be among the k largest. This takes a small part of the time of
    a partition of the row.
    """
    groups = len(x) // GROUP
    if groups < 2 * k:
        return np.arange(len(x))
    maxima = x[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
    return np.flatnonzero(x >= np.partition(maxima, groups - k)[groups - k])


def _filtered(ids: np.ndarray, x: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Logits that top-p and min-p leave of x, best first. Each takes a beginning; the shorter one counts.
    What is minus infinity (`masked`) is left out first.
    """
    n = int(np.count_nonzero(x > -np.inf))
    ids, x = ids[:n], x[:n]
    odds = _odds(x, params)
    return _first(min(_nucleus(odds, params, odds.sum()), _likely(odds, params)), ids, odds)


def _odds(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities in terms of the first one's: float64."""
    with np.errstate(over="ignore"):  # a tiny temperature: the others' odds underflow to 0
        return np.exp((x.astype(np.float64) - x[0]) / params.temperature)


def _nucleus(odds: np.ndarray, params: SamplingParams, total: float) -> int:
    """How many top-p takes, where all odds together are `total`; one more than there are: not these alone."""
    if params.top_p == 1:
        return len(odds) + 1
    return int(np.searchsorted(np.cumsum(odds), params.top_p * total, side="left")) + 1


def _likely(odds: np.ndarray, params: SamplingParams) -> int:
    """How many min-p takes; one more than there are: all of these, and maybe others."""
    n = int(np.count_nonzero(odds >= params.min_p))
    return n if n < len(odds) else n + 1


def _first(n: int, ids: np.ndarray, odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[:n], odds[:n] / odds[:n].sum()


def masked(row: np.ndarray | LargestLogits, allowed: np.ndarray) -> np.ndarray | LargestLogits:
    """A row of logits in which only some tokens are left: bool [≤ vocab], which of the first. The others are
    minus infinity, or missing among the largest. Raises CheckpointError for a row that has no largest.
    """
    if isinstance(row, LargestLogits):
        if len(row.ids):
            _check_finite(row.values[0])
        known = row.ids < len(allowed)
        known[known] = allowed[row.ids[known]]
        n = int(np.count_nonzero(allowed))
        return LargestLogits(row.ids[known], row.values[known], n, 0.0, lambda: _masked(row.whole(), allowed))
    return _masked(row, allowed)


def _masked(row: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    _check_finite(row.max())
    out = np.full_like(row, -np.inf)
    np.copyto(out[: len(allowed)], row[: len(allowed)], where=allowed[: len(row)])
    return out


def largest_suffice(params: SamplingParams) -> bool:
    """Whether a token hardly ever takes more of the row than its largest logits."""
    filtered = params.temperature == 0 or params.top_k or params.top_p < 1 or params.min_p > 0
    return bool(filtered) and not params.may_raise


def total_temperature(params: SamplingParams) -> float:
    """The temperature of the total that `LargestLogits` should come with; 0: none is needed."""
    needed = params.top_p < 1 and not params.top_k and not params.penalizes
    return params.temperature if needed and params.temperature > 1e-6 else 0.0


def _of_largest(
    largest: LargestLogits, params: SamplingParams, penalties: Penalties | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """`candidates`, or None if that takes more of the row."""
    ids, x = _order_of_largest(largest, penalties)
    k = min(params.top_k or largest.n, largest.n)
    if k <= len(ids):
        return _filtered(ids[:k], x[:k], params)
    if not len(ids):
        return None
    odds = _odds(x, params)
    beyond = len(ids) + 1
    low = high = beyond
    if params.top_p < 1:
        low = 1
        if largest.total and total_temperature(params):
            off = largest.TOTAL_WITHIN
            low, high = (_nucleus(odds, params, largest.total * f) for f in (1 - off, 1 + off))
    likely = _likely(odds, params)
    n = min(high, likely)
    return _first(n, ids, odds) if n < beyond and n == min(low, likely) else None


def _order_of_largest(largest: LargestLogits, penalties: Penalties | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits after the penalties, best first, as far as nothing that is missing can come before."""
    ids, x = largest.ids, largest.values
    if not len(ids):
        return ids, x
    _check_finite(x[0])
    if penalties is None:
        return ids, x
    if penalties.params.may_raise:  # what is missing may come before
        return ids[:0], x[:0]
    edge, changed = x[-1], penalties.changed(x, ids)
    if np.array_equal(x, changed):
        return ids, x
    order = np.lexsort((ids, -changed))
    ids, x = ids[order], changed[order]
    n = int(np.count_nonzero(x > edge)) if len(ids) < largest.n else len(ids)
    return ids[:n], x[:n]


def penalize(logits: np.ndarray, penalties: Penalties | None) -> np.ndarray:
    """Logits with the penalties applied; NaN (a damaged model) raises CheckpointError."""
    _check_finite(logits.max())  # NaN wins every max
    return logits if penalties is None else penalties.changed(logits)


def _check_finite(best: np.floating) -> None:
    if not np.isfinite(best):
        raise no_finite_logit()


def greedy(best: int) -> int:
    """The token of a row whose argmax is `best`, as `Backend.step_greedy` gives it.

    Raises CheckpointError where it says that there is none.
    """
    if best < 0:
        raise no_finite_logit()
    return int(best)


def best_of(row: np.ndarray | LargestLogits) -> int:
    """The argmax of a row of logits as `Backend.step_greedy` gives it: the lowest id on a tie, -1 where there
    is nothing to choose.
    """
    if isinstance(row, LargestLogits):
        if len(row.ids):
            return int(row.ids[0]) if np.isfinite(row.values[0]) else -1
        row = row.whole()
    return int(np.argmax(row)) if np.isfinite(row).all() else -1


def no_finite_logit() -> CheckpointError:
    """The network computed NaN: its weights are damaged."""
    return CheckpointError(
        "The model computed no finite logits (NaN or infinity), so it cannot go on.",
        "Its weights are damaged; tinychat doctor --verify MODEL finds out which.",
    )


def sample(
    logits: np.ndarray | LargestLogits,
    params: SamplingParams,
    seed: int,
    position: int,
    penalties: Penalties | None = None,
) -> int:
    """The token for `position`: argmax at temperature 0, else of log p + Gumbel over the candidates."""
    if params.temperature == 0:
        if isinstance(logits, LargestLogits):
            ids, _ = _order_of_largest(logits, penalties)
            if len(ids):
                return int(ids[0])
            logits = logits.whole()
        return int(np.argmax(penalize(logits, penalties)))
    ids, p = candidates(logits, params, penalties)
    with np.errstate(divide="ignore"):
        return int(ids[np.argmax(np.log(p) + gumbel(seed, position, ids))])


def choose_seed(params: SamplingParams) -> int:
    """The seed asked for, or a fresh one."""
    if params.seed is not None:
        return params.seed
    return int(np.random.SeedSequence().generate_state(1)[0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities over the last axis."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
