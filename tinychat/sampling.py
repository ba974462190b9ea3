"""From logits to a token: penalties, temperature, top-k, top-p, min-p, then Gumbel-max with counter-based
noise.

The noise for a candidate depends on (seed, position, token id) only, so the same seed gives the same text,
however the tokens were computed; with a draft model both sides draw with the same noise (the coupled rule of
docs/design.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from tinychat.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is argmax (lowest id on a tie).

    top_k 0 and top_p 1 and min_p 0 are off. repeat_penalty as in CTRL (Keskar et al. 2019), over the whole
    context.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (tuple, list)) or any(not isinstance(s, str) or not s for s in stop):
            raise UsageError(f"stop is {self.stop!r}.", "Give texts of at least one character.")
        object.__setattr__(self, "stop", tuple(stop))
        checks = (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
        )
        for name, low, high in checks:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}.", f"It must lie between {low} and {high}.")
        for name in ("top_k", "seed", "max_tokens"):
            value = getattr(self, name)
            if value is None and name != "top_k":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} is {value!r}.", "It must be a whole number, 0 or more.")

    @property
    def greedy(self) -> bool:
        """Whether the next token is a plain argmax of the logits."""
        return self.temperature == 0 and self.repeat_penalty == 1.0

    def but(self, **changes) -> SamplingParams:
        """A copy with the given fields changed; unknown names raise UsageError, None values are left out."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise UsageError(
                f"Unknown sampling parameter {', '.join(sorted(unknown))}.",
                f"Known: {', '.join(f.name for f in fields(self))}.",
            )
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


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
    logits: np.ndarray, params: SamplingParams, seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The filtered distribution: (ids int64 [n], probabilities float64 [n], which sum to 1), best first.

    logits: float32 [vocab]. seen: ids that occurred so far, for the repetition penalty.
    Order as in transformers: penalty, temperature, top-k, top-p, min-p. Raises UsageError at temperature 0.
    """
    if params.temperature == 0:
        raise UsageError("Temperature 0 has no distribution.", "Use argmax.")
    x = penalize(logits, params, seen)
    k = min(params.top_k, len(x)) if params.top_k else len(x)
    if k < len(x):
        ids = np.argpartition(-x, k - 1)[:k]
        # Ties at the edge: every id equal to the k-th is a candidate for the cut, so take the lowest ids.
        edge = x[ids].min()
        above = np.flatnonzero(x > edge)
        ids = np.concatenate([above, np.flatnonzero(x == edge)[: k - len(above)]])
    else:
        ids = np.arange(len(x))
    ids = ids[np.lexsort((ids, -x[ids]))]
    with np.errstate(over="ignore"):  # a tiny temperature: the others' odds underflow to 0
        p = np.exp((x[ids].astype(np.float64) - x[ids[0]]) / params.temperature)
    p /= p.sum()
    if params.top_p < 1:
        keep = max(1, int(np.searchsorted(np.cumsum(p), params.top_p, side="left")) + 1)
        ids, p = ids[:keep], p[:keep]
        p = p / p.sum()
    if params.min_p > 0:
        keep = p >= params.min_p * p[0]
        ids, p = ids[keep], p[keep]
        p = p / p.sum()
    return ids, p


def penalize(logits: np.ndarray, params: SamplingParams, seen: np.ndarray | None) -> np.ndarray:
    """Logits with the repetition penalty applied to the ids in `seen`; NaN (a damaged model) raises
    UsageError.
    """
    if not np.isfinite(logits.max()):  # NaN wins every max
        raise UsageError("The model computed no finite logit.", "The checkpoint is damaged; pull it again.")
    if params.repeat_penalty == 1.0 or seen is None or len(seen) == 0:
        return logits
    x = logits.copy()
    s = x[seen]
    x[seen] = np.where(s > 0, s / params.repeat_penalty, s * params.repeat_penalty)
    return x


def sample(
    logits: np.ndarray, params: SamplingParams, seed: int, position: int, seen: np.ndarray | None = None
) -> int:
    """The token for `position`: argmax at temperature 0, else of log p + Gumbel over the candidates."""
    if params.temperature == 0:
        return int(np.argmax(penalize(logits, params, seen)))
    ids, p = candidates(logits, params, seen)
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
