"""Policies that choose cached tokens to give up when a budget is full: H2O, a sliding window, or (to compare
with) chance.

H2O (Zhang et al. 2023) keeps the heavy hitters: the slots that received the most attention. Here a slot's
votes are the attention probability that it got, summed over the query heads of its KV head, divided by the
number of queries that could see it, so that age alone neither helps nor harms. A head's output is the mean of
its values weighted by those probabilities, so what giving a slot up would change is its votes times how far
its value lies from that mean; the slots with the least are given up. Each layer and KV head chooses for
itself. The first tokens (attention sinks, the system prompt) and the most recent ones are never given up
(StreamingLLM, Xiao et al. 2023: sinks and recent tokens alone are the policy "window").

Attention does not care in which slot a token lies, so victims are replaced by the tokens of the last slots,
and the sequence is shorter by as many: no hole, no mask, and whatever comes next is appended as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinychat.backends.interface import BLOCK
from tinychat.base.errors import UsageError

POLICIES = ("h2o", "window", "random")
SINKS = 4  # StreamingLLM: the first four tokens take the attention that nothing else deserves
CHUNK = 256  # tokens of a prompt between two evictions, at most
WATCHED = 32  # queries at the end of a prompt's chunk that vote (SnapKV's observation window)
SMALLEST = 96  # slots that a budget needs beyond what is pinned


@dataclass(frozen=True)
class EvictionPolicy:
    """budget: slots kept, a multiple of BLOCK. pinned: first tokens never given up. recent: newest ones."""

    name: str
    budget: int
    pinned: int = SINKS
    recent: int = 0

    @staticmethod
    def of(name: str, budget: int, pinned: int = SINKS, recent: int | None = None) -> EvictionPolicy:
        """A policy with a quarter of the budget recent, less where pins need it (docs/long-chats-figures.md).

        Raises UsageError for an unknown name, or a budget that the pinned tokens fill.
        """
        if name not in POLICIES:
            raise UsageError(f"kv_policy={name!r} is not known.", "Use h2o, window or none.")
        budget, pinned = budget // BLOCK * BLOCK, max(SINKS, pinned)
        if budget < pinned + SMALLEST:
            least = -(-(pinned + SMALLEST) // BLOCK) * BLOCK
            first, beside = "the system prompt", ""
            if pinned == SINKS:
                first, beside = "the first ones", ", and more by the length of a system prompt"
            raise UsageError(
                f"A KV budget of {budget} tokens is too small: {pinned} are pinned ({first}) and "
                f"{SMALLEST} more are needed.",
                f"Use --kv-budget {least} or more{beside}.",
            )
        free = budget - pinned - 2 * BLOCK
        return EvictionPolicy(name, budget, pinned, min(budget // 4 if recent is None else recent, free))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt between two evictions: constant, so that what is given up does not depend on how
        fast the machine is.
        """
        return max(BLOCK, min(CHUNK, (self.budget - self.pinned - self.recent) // 2 // BLOCK * BLOCK))

    def excess(self, slots: int, n: int) -> int:
        """Slots to give up of so many in use before n more are: a multiple of BLOCK."""
        return max(0, -(-(slots + n - self.budget) // BLOCK) * BLOCK)

    # Every query of an answer votes: without the early votes, what was told early is forgotten
    # (docs/long-chats-figures.md). Of a prompt the last ones do, and the last ones of a chunk that an
    # eviction follows. The prompt alone decides them: a prefix found in the cache that ends before them
    # changes nothing.

    def chunk_end(self, at: int, n_prompt: int) -> int:
        """End of the chunk of token `at`."""
        return min((at // self.chunk + 1) * self.chunk, n_prompt)

    def voters(self, end: int, slots: int, n_prompt: int) -> int:
        """How many of the last queries of the chunk that ends there vote; `slots` are in use then."""
        following = self.chunk_end(end, n_prompt) - end
        return WATCHED if end == n_prompt or slots + following > self.budget else 0

    def first_voter(self, n_prompt: int) -> int:
        """The first token of a prompt, read from its beginning, whose query votes."""
        end = 0
        while end < n_prompt:
            end = self.chunk_end(end, n_prompt)
            if self.voters(end, end, n_prompt):
                break
        return max(0, end - WATCHED)

    def with_pinned(self, pinned: int) -> EvictionPolicy:
        """The same policy for another system prompt."""
        return (
            self if self.pinned == max(SINKS, pinned) else EvictionPolicy.of(self.name, self.budget, pinned)
        )


class Votes(NamedTuple):
    """Counts of a ledger at some time: slots, queries, scores and births."""

    size: int
    seen: int
    scores: np.ndarray
    born: np.ndarray


def _numbers(a: np.ndarray) -> np.ndarray:
    """The array without negative numbers and NaN (of a broken checkpoint): so a choice is always possible."""
    return np.minimum(np.fmax(a, 0), 1e30, dtype=np.float32)


ARRAYS = ("_tokens", "_positions", "_born", "_scores")  # of a ledger


class Ledger:
    """Facts that eviction knows of one branch: for each layer, KV head and slot which of the branch's tokens
    is there, the position of that, the attention that it received, and since when. All arrays [layers,
    kv_heads, slots].
    """

    def __init__(self, policy: EvictionPolicy, n_layers: int, n_kv_heads: int):
        self.policy = policy
        self.shape = n_layers, n_kv_heads
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.size = 0
        self.next_position = 0
        self.seen = 0  # queries whose attention was counted so far
        self.given_up = 0  # slots, so far
        self.remembered: Votes | None = None
        self._grow(0)

    def _grow(self, capacity: int) -> None:
        grown = {}
        for name, kind in zip(ARRAYS, (np.int32, np.int32, np.int32, np.float32), strict=True):
            grown[name] = np.zeros((*self.shape, capacity), kind)
            if self.size:
                grown[name][..., : self.size] = getattr(self, name)[..., : self.size]
        self.__dict__ |= grown  # all at once: an exception in between would leave them of different lengths

    def copy(self) -> Ledger:
        """A copy for a fork."""
        other = Ledger(self.policy, *self.shape)
        other.size, other.next_position, other.seen = self.size, self.next_position, self.seen
        other.remembered, other.given_up = self.remembered, self.given_up
        for name in ARRAYS:
            setattr(other, name, getattr(self, name).copy())
        return other

    def _shrink(self, size: int) -> None:
        self._scores[..., size : self.size] = 0  # behind the last slot there are no votes, always
        self.size = size

    @property
    def positions(self) -> np.ndarray:
        """int32 [layers, kv_heads, slots]."""
        return self._positions[..., : self.size]

    @property
    def tokens(self) -> np.ndarray:
        """int32 [layers, kv_heads, slots]: which token of the branch, counted from its first."""
        return self._tokens[..., : self.size]

    def kept(self, edges: Sequence[int]) -> list[float]:
        """Slots that a layer's KV head has, on average, of the tokens between two neighbouring edges."""
        heads = max(1, self.shape[0] * self.shape[1])
        slots = np.bincount(self.tokens.ravel(), minlength=self.size + self.given_up + 1)
        before = np.concatenate(([0], np.cumsum(slots)))  # slots of all tokens before one
        return [float(before[b] - before[a]) / heads for a, b in pairwise(edges)]

    @property
    def born(self) -> np.ndarray:
        """int32 [layers, kv_heads, slots]: queries that had been counted when the slot was written."""
        return self._born[..., : self.size]

    @property
    def scores(self) -> np.ndarray:
        """float32 [layers, kv_heads, slots]: attention received since then."""
        return self._scores[..., : self.size]

    def restore(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        born: np.ndarray,
        scores: np.ndarray,
        next_position: int,
        seen: int,
        given_up: int,
    ) -> None:
        """Go back to what was saved."""
        self._tokens, self._positions, self._born, self._scores = (
            a.copy() for a in (tokens, positions, born, scores)
        )
        self.given_up = given_up
        self.size, self.next_position, self.seen = positions.shape[-1], next_position, seen

    def votes(self) -> np.ndarray:
        """float32 [layers, kv_heads, slots]: the attention that each slot gets from a query, on average."""
        age = np.maximum(1, self.seen - self.born).astype(np.float32)
        return _numbers(self.scores / age)

    @property
    def watches(self) -> bool:
        """Whether the policy wants to know what queries attend to."""
        return self.policy.name == "h2o"

    def remember(self) -> None:
        """Keep the votes as they are now: a prompt has been read, and another answer to it may be wanted.
        They are `remembered` until a slot of then is given up or forgotten.
        """
        if self.watches:
            self.remembered = Votes(self.size, self.seen, self.scores.copy(), self.born.copy())

    def recall(self, votes: Votes) -> None:
        """The votes as they were; the slots are there again."""
        self.remembered, self.seen = votes, votes.seen
        self._scores[..., : votes.size], self._born[..., : votes.size] = votes.scores, votes.born

    def tally(self, n: int) -> np.ndarray:
        """Array to which a backend adds what the queries of n more tokens attend to, if all stay: float32
        [1, layers, kv_heads, ≥ slots].
        """
        self._reserve(n)
        return self._scores[None]

    def _reserve(self, n: int) -> None:
        end = self.size + n
        if end > self._positions.shape[-1]:
            self._grow(max(end, min(2 * end, self.policy.budget)))

    def append(self, n: int, rows: int = 0, scores: np.ndarray | None = None) -> None:
        """n tokens have been written behind the others; their last `rows` queries were counted.

        scores: float32 [≥ rows, layers, kv_heads, ≥ slots], what they attended to; None: it is in `tally`.
        """
        self._reserve(n)
        end = self.size + n
        watched = np.maximum(0, np.arange(n, dtype=np.int32) - (n - rows))
        self._tokens[..., self.size : end] = self.size + self.given_up + np.arange(n, dtype=np.int32)
        self._positions[..., self.size : end] = self.next_position + np.arange(n, dtype=np.int32)
        self._born[..., self.size : end] = self.seen + watched
        self.size, self.next_position = end, self.next_position + n
        self.seen += rows
        for row in () if scores is None else scores[:rows]:
            self._scores[..., :end] += row[..., :end]

    def truncate(self, size: int) -> None:
        """Forget the last slots (rollback): those that were appended since the last eviction."""
        self.next_position -= self.size - size
        self._shrink(size)
        if self.remembered and size < self.remembered.size:
            self.remembered = None

    def evict(self, n: int, value: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Choose n slots (a multiple of BLOCK) of each layer and KV head, and fill their places from the end.

        value: float32 [layers, kv_heads, slots], what H2O keeps the most of; default: `votes`.

        Returns which slot goes where, int32 [layers, kv_heads, n] each, -1 for nothing: what the backend has
        to move. Afterwards there are n slots fewer.
        """
        keep, self.remembered = self.size - n, None
        victims = np.sort(self._choose(n, value), axis=-1)
        hole = victims < keep  # in every row they come first
        stays = np.ones((*self.shape, n), bool)  # of the last n slots, those that are no victims: they move
        layer, head, i = np.nonzero(~hole)
        stays[layer, head, victims[layer, head, i] - keep] = False
        movers = keep + np.argsort(~stays, axis=-1, kind="stable")
        # As many movers as holes in every row: the k-th mover goes to the k-th hole.
        src = np.where(hole, movers, -1).astype(np.int32)
        dst = np.where(hole, victims, 0).astype(np.int32)
        layer, head, i = np.nonzero(hole)
        for a in (getattr(self, name) for name in ARRAYS):
            a[layer, head, dst[layer, head, i]] = a[layer, head, src[layer, head, i]]
        self._shrink(keep)
        self.given_up += n
        return src, dst

    def _choose(self, n: int, value: np.ndarray | None) -> np.ndarray:
        """Victims, [layers, kv_heads, n] slot numbers: the lowest of what is neither pinned nor recent."""
        p, positions = self.policy, self.positions
        if p.name == "h2o":
            value = self.votes() if value is None else value
        elif p.name == "window":
            value = positions.astype(np.float32)
        else:
            value = np.random.default_rng([self.next_position, self.seen]).random(positions.shape, np.float32)
        # The newest stay although a chunk may need more room than is left beside them.
        recent = min(p.recent, self.size - p.pinned - n)
        protected = (positions < p.pinned) | (positions >= self.next_position - recent)
        value = np.where(protected, np.inf, _numbers(value))
        return np.argpartition(value, n - 1, axis=-1)[..., :n]

    def reindex(self) -> np.ndarray:
        """Positions become consecutive again, in their order. Returns by how much each slot's key has to
        turn, int32 [layers, kv_heads, slots].
        """
        before, self.remembered = self.positions.copy(), None
        order = np.argsort(before, axis=-1, kind="stable")
        np.put_along_axis(
            self._positions[..., : self.size], order, np.arange(self.size, dtype=np.int32), axis=-1
        )
        self.next_position = self.size
        return self.positions - before
