"""One sequence in a model's memories: its token ids, and what it holds in each memory.

A block is found again by a hash of every token id up to its end, so branches of a conversation, later turns
and other sessions share what they have in common. A prefix can be continued where every memory has what the
next token needs: a paged memory every block, a window memory the last blocks, a state memory the state there.

A branch may give up slots of its paged memory (`tinychat.engine.eviction` says which). From then on its
blocks are its own: what they hold is no longer a function of the token ids alone, so they are neither shared
nor found by content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tinychat.backends.interface import BLOCK, STRETCH, Slots, States, Tails
from tinychat.engine.eviction import Ledger, Votes
from tinychat.engine.memory.paged import Paged
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.memory.state import State
from tinychat.engine.memory.tail import Tail
from tinychat.engine.memory.window import Window

Part = Paged | Window | State | Tail


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading elements agree."""
    n = min(len(a), len(b))
    x, y = np.asarray(a[:n], dtype=np.int64), np.asarray(b[:n], dtype=np.int64)
    different = np.flatnonzero(x != y)
    return int(different[0]) if len(different) else n


class Branch:
    """Token ids, and a part for each memory.

    `evicted` of the ids have no slot in the paged memory any more; with a ledger, eviction may begin.
    """

    def __init__(self, parts: Sequence[Part], root_key: bytes = b"", ledger: Ledger | None = None):
        self.parts = tuple(parts)
        self.ids = array("i")  # a conversation may have no end: four bytes a token
        self.ledger = ledger
        self.evicted = 0
        self._floor = 0  # ids at the last eviction: going back behind it means to start over
        self._keys: list[bytes] = []  # of the full blocks
        self._root = root_key
        self._whole = True  # False while slots or votes are rewritten

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def slots(self) -> int:
        """Slots in use in the paged memory."""
        return len(self.ids) - self.evicted

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.ledger.next_position if self.ledger else len(self.ids)

    @property
    def holds_blocks(self) -> bool:
        """Whether it has anything in any memory."""
        return any(part.held() for part in self.parts)

    def filled(self, part: Part) -> int:
        """Slots or tokens that it has in one memory."""
        return self.slots if part.thinned else len(self.ids)

    def match(self, ids: Sequence[int], limit: int | None = None) -> int:
        """Keep or find the longest cached prefix of `ids`; afterwards `len(self)` is its length, which is
        returned. Of what other branches left, not more than the first `limit` tokens.

        Votes of tokens that are no longer there cannot be taken back: where a policy counts them and nothing
        was given up yet, the branch begins again with what is found, as if the other words were never said.
        """
        self.keep()
        same = common_prefix(self.ids, ids)
        voted = self.ledger is not None and self.ledger.seen > 0
        if same < self._floor or (voted and not self.evicted and same < len(self.ids)):
            self.free()
            same = 0
        if self.evicted:
            n, keys = self._longest(same, same, []), []
            if n < same and n < self._floor:
                self.free()
                return self.match(ids, limit)
        else:
            keys = self._cover(ids, same, len(ids) if limit is None else min(len(ids), limit))
            n = self._longest(max(same, len(keys) * BLOCK), same, keys)
        self._take(n, same, keys, ids)
        return n

    def _cover(self, ids: Sequence[int], same: int, limit: int) -> list[bytes]:
        """Keys of the full blocks of `ids` as far as they are there; the first `same` tokens are its own."""
        keys = self._keys[: same // BLOCK]
        for i in range(len(keys), limit // BLOCK):
            key = self._key(keys[-1] if keys else self._root, ids[i * BLOCK : (i + 1) * BLOCK])
            if not all(part.finds(key) for part in self.parts):
                break
            keys.append(key)
        return keys

    def _longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest prefix of n tokens that can be continued in every memory."""
        if n == own == len(self.ids):
            return n
        while (least := min(self._longest_in(part, n, own, keys) for part in self.parts)) < n:
            n = least
        return n

    def _longest_in(self, part: Part, n: int, own: int, keys: Sequence[bytes]) -> int:
        gone = self.evicted if part.thinned else 0
        return part.longest(n - gone, own - gone, keys) + gone

    def _take(self, n: int, own: int, keys: Sequence[bytes], ids: Sequence[int]) -> None:
        """Hold the first n of `ids`, of which `own` are its own; `_longest` has allowed it."""
        if n == own == len(self.ids):
            return
        self._whole = False
        for part in self.parts:
            gone = self.evicted if part.thinned else 0
            part.take(n - gone, own - gone, keys)
        kept = min(n, own)
        if self.ledger and kept < len(self.ids):
            self.ledger.truncate(kept - self.evicted)
        del self.ids[kept:]
        self.ids.extend(ids[kept:n])
        self._keys = list(keys[: n // BLOCK])
        if self.ledger and n > kept:
            self.ledger.append(n - kept)
        self._whole = True

    def may_rewind(self, prompt: Sequence[int]) -> bool:
        """Whether the branch has read exactly this prompt, nothing was given up since, and it can go back
        there.
        """
        votes, n = self.ledger.remembered if self.ledger else None, len(prompt)
        if not votes or votes.size + self.evicted != n or common_prefix(self.ids, prompt) != n:
            return False
        return self._behind(n - 1) >= max(self._floor, n - 1 - max(2 * BLOCK, STRETCH))

    def _behind(self, n: int) -> int:
        """How many of its first n tokens it can go back to."""
        return self._longest(n, n, self._keys[: n // BLOCK])

    def rewind(self, prompt: Sequence[int]) -> Votes | None:
        """Go back to before the last token of the prompt, or a few more, if it is the one that was read last.
        They vote no second time; when they have run, `Ledger.recall` takes what is returned.
        """
        if self.ledger is None or not self.may_rewind(prompt):
            return None
        votes = self.ledger.remembered
        self.truncate(len(prompt) - 1)
        return votes

    def reserve(self, n: int, each: bool = False) -> None:
        """Have private room for n more tokens. Raises PoolExhaustedError; then nothing has changed but
        copies.

        each: state memories keep what lies behind each of them (drafts that are verified).
        """
        try:
            for part in self.parts:
                part.reserve(self.filled(part), n, each)
        except PoolExhaustedError:
            self.drop_empty_blocks()
            raise

    def spans(
        self, scores: np.ndarray | None = None, scored_rows: int = 0
    ) -> tuple[Slots | States | Tails, ...]:
        """Places of a step's rows in each memory; scores: of the one that a ledger watches."""
        return tuple(
            part.span(self.slots, scores, scored_rows) if part.thinned else part.span(len(self.ids))
            for part in self.parts
        )

    def commit(self, ids: Sequence[int]) -> None:
        """The backend has written what belongs to `ids`; room beyond them is given back. The ledger is told
        by who has the scores.
        """
        before, slots = len(self.ids), self.slots
        self.ids.extend(ids)
        if not self.evicted:
            for i in range(len(self._keys), len(self.ids) // BLOCK):
                previous = self._keys[-1] if self._keys else self._root
                self._keys.append(self._key(previous, self.ids[i * BLOCK : (i + 1) * BLOCK]))
                for part in self.parts:
                    part.publish(i, self._keys[-1])
        for part in self.parts:
            part.commit(slots if part.thinned else before, self.filled(part), self._keys)

    def keep(self) -> None:
        """Take a snapshot: a prompt or an answer ends here, and somebody may want to go on from there."""
        if not self.evicted:
            for part in self.parts:
                part.keep(len(self.ids), self._keys)

    def truncate(self, n: int) -> int:
        """Forget everything after the first n tokens, or after the last ones before these from where one can
        go on: how many are left. Raises ValueError where an eviction came in between.
        """
        if n >= len(self.ids):
            return len(self.ids)
        left = self._behind(n)
        if left < self._floor:
            raise ValueError(f"{n} tokens: the branch was thinned out at {self._floor}")
        self._take(left, n, self._keys[: n // BLOCK], self.ids)
        return left

    # Eviction

    def own(self, n: int) -> None:
        """Make every block private that giving n slots up is going to overwrite, and have room for what is
        needed then. Raises PoolExhaustedError; what is done stays.
        """
        for part in self.parts:
            if part.thinned:
                if isinstance(part, Tail):
                    part.thin(self.slots, self.slots - n)
                part.own()

    def own_all(self) -> None:
        """Make every block of every memory private, before keys are turned. Raises PoolExhaustedError; what
        is done stays.
        """
        for part in self.parts:
            if isinstance(part, Tail):
                part.thin(self.filled(part), self.filled(part))
            part.own()

    def give_up(self, n: int, value: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """n slots (a multiple of BLOCK) of each layer and KV head are no longer needed; every block is
        private.

        value, and what is returned (slots that the backend has to move): as of `Ledger.evict`. The table
        still has the last blocks.
        """
        assert self.ledger is not None
        moves = self.ledger.evict(n, value)
        self.evicted += n
        self._floor = len(self.ids)
        self._keys = []
        return moves

    def reindex(self) -> list[np.ndarray | int]:
        """Positions become consecutive; every block is private. Returns what the backend has to turn the keys
        of each memory by: as `Ledger.reindex` does, or one number for all.
        """
        assert self.ledger is not None
        before = self.ledger.next_position
        self._floor = len(self.ids)
        turns = self.ledger.reindex()
        return [turns if part.thinned else self.ledger.next_position - before for part in self.parts]

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """While slots or their votes are rewritten in place. Where that fails nobody knows what they hold:
        everything is given back, to be read again.
        """
        self._whole = False
        try:
            yield
        except BaseException:
            self.free()
            raise
        self._whole = True

    def drop_empty_blocks(self) -> None:
        """Give back what lies behind the last slot."""
        for part in self.parts:
            part.trim(self.filled(part))

    # Order after an exception, files, forks

    def repair(self) -> None:
        """After a change that an exception may have left half-done, before `BlockPool.rebuild`: what the
        branch holds fits together again, or it holds nothing.
        """
        fits = (
            self._whole
            and self.slots >= 0
            and all(part.fits(self.filled(part)) for part in self.parts)
            and len(self._keys) <= (0 if self.evicted else len(self.ids) // BLOCK)
            and (self.ledger is None or self.ledger.size == self.slots)
        )
        if fits:
            self.drop_empty_blocks()
        else:
            for part in self.parts:
                part.forget()
            self.free()

    def make(self, n: int, evicted: int) -> None:
        """Have room for what was saved of a branch of n tokens. Raises PoolExhaustedError; then it is empty.

        The branch is empty before, and until `restore` nothing else may be done with it.
        """
        try:
            for part in self.parts:
                part.make(n - evicted if part.thinned else n)
        except PoolExhaustedError:
            self.free()
            raise

    def restore(self, ids: Sequence[int], evicted: int) -> None:
        """The backend has filled what `make` made with what was saved of `ids`, `evicted` of them given up;
        what was saved of the ledger comes behind.
        """
        self.evicted = evicted
        self._floor = len(ids) if evicted else 0
        self.ids = array("i", ids)
        for i in range(0 if evicted else len(ids) // BLOCK):
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(self._key(previous, self.ids[i * BLOCK : (i + 1) * BLOCK]))
            for part in self.parts:
                part.publish(i, self._keys[-1])
        if self.ledger and not evicted:
            self.ledger.append(len(ids))

    def fork(self) -> Branch:
        """A second branch that shares everything until one of them writes."""
        other = self._empty([part.fork() for part in self.parts])
        other.ids, other._keys = self.ids[:], list(self._keys)
        other.evicted, other._floor = self.evicted, self._floor
        other.ledger = self.ledger and self.ledger.copy()
        return other

    def free(self) -> None:
        """Give everything back; what is indexed can still be found by content."""
        for part in self.parts:
            part.free()
        self.ids, self._keys = array("i"), []
        self.evicted = self._floor = 0
        if self.ledger:
            self.ledger.clear()
        self._whole = True

    def _empty(self, parts: Sequence[Part]) -> Branch:
        return Branch(parts, self._root)

    @staticmethod
    def _key(previous: bytes, ids: Sequence[int]) -> bytes:
        content = previous + np.asarray(ids, dtype=np.int32).tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()
