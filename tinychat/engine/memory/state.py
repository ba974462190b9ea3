"""Part of a branch in a state memory: the slot of its state, and one to go back to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.backends.interface import BLOCK, States
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError

ROWS = 16  # of a verification window: each keeps its state until it is known how many drafts were right
SNAPSHOTS = 4  # that a pool has room for beside the branch in use and its fork


class State:
    """`current` holds the state behind the last token, `boundary` that behind the first `at` tokens, the last
    whole stretch before it. A slot is written once: a step reads one and writes others, so a step that fails
    has changed nothing.

    A snapshot is a slot of the pool that is found by the key of the block that ends there. That of a prompt
    is a stretch before its last whole one: what comes at its end to begin an answer, a marker of reasoning
    perhaps, may not be there any more in the next turn. `earlier` holds it until the next prompt.
    """

    thinned = False

    def __init__(self, pool: BlockPool, spacing: int, stretch: int = BLOCK):
        """spacing: tokens between two snapshots in a long text, a multiple of `stretch`: see MemorySpec."""
        self.pool, self.spacing, self.stretch = pool, spacing, stretch
        self.current = self.boundary = self.earlier = -1
        self.length = self.at = self._earlier_at = 0
        self._new = False  # whether `earlier` is yet to become a snapshot
        self._places: tuple[int, ...] = ()  # of states that are going to be restored
        self._reading = False  # whether the step in preparation is a prompt's
        self.kept = np.zeros(0, np.int32)  # slots that the step in preparation writes, -1 for none
        self._ends: list[int] = []  # where that step has snapshots

    def held(self) -> list[int]:
        """Slots that it has a reference to."""
        own = (self.current, self.boundary, self.earlier, *self.kept.tolist())
        return [slot for slot in own if slot >= 0]

    def reserve(self, length: int, n: int, each: bool = False) -> None:
        """Have slots for the states behind n more tokens that somebody needs; behind each of them where the
        step verifies drafts. Raises PoolExhaustedError.
        """
        self._drop_kept()
        # Snapshots in an answer would drive the prompt's own out, so only a prompt has them on its way.
        self._reading = n > 1 and not each
        self._ends = self._snapshots(length, length + n) if self._reading else []
        whole = (length + n - 1) // self.stretch * self.stretch
        wanted = (whole, whole - self.stretch) if self._reading else (whole,)
        ends = {length + n, *self._ends, *[end for end in wanted if end > length]}
        rows = range(n) if each else sorted(end - length - 1 for end in ends)
        if len(rows) > self.pool.available():
            raise PoolExhaustedError(self.pool)
        self.kept = np.full(n, -1, np.int32)
        for row in rows:
            self.kept[row] = self.pool.allocate()

    def _snapshots(self, before: int, length: int) -> list[int]:
        """Lengths between these at which snapshots are taken."""
        return list(range((before // self.spacing + 1) * self.spacing, length + 1, self.spacing))

    def span(self, length: int, scores: np.ndarray | None = None, scored_rows: int = 0) -> States:
        """Slots that a step reads and leaves."""
        return States(self.current, self.kept)

    def publish(self, i: int, key: bytes) -> None:
        """Nothing: `commit` publishes what is worth it."""

    def commit(self, before: int, length: int, keys: Sequence[bytes]) -> None:
        """The step came as far as `length`."""
        if length == before:
            return self._drop_kept()
        whole = (length - 1) // self.stretch * self.stretch
        for n in self._ends:
            if n <= length and n // BLOCK <= len(keys):
                row = n - before - 1
                self.kept[row] = self.pool.publish(int(self.kept[row]), keys[n // BLOCK - 1])
        if self._reading or self._new:
            self._hold_earlier(whole - self.stretch, before)
        if whole > self.at and whole >= before:  # a branch from disk begins without the state that lies there
            slot = self.current if whole == before else int(self.kept[whole - before - 1])
            self.pool.retain(slot)
            old, self.boundary, self.at = self.boundary, slot, whole
            if old >= 0:
                self.pool.release(old)
        last = length - before - 1
        old, self.current, self.length = self.current, int(self.kept[last]), length
        self.kept[last] = -1
        if old >= 0:
            self.pool.release(old)
        self._drop_kept()

    def _hold_earlier(self, n: int, before: int) -> None:
        """Hold the state behind n tokens, if the step that began at `before` has it."""
        own = {self.at: self.boundary, before: self.current}
        slot = own.get(n, -1) if n <= before else int(self.kept[n - before - 1])
        if n > 0 and slot >= 0:
            self.pool.retain(slot)
            old, self.earlier, self._earlier_at, self._new = self.earlier, slot, n, True
            if old >= 0:
                self.pool.release(old)

    def _drop_kept(self) -> None:
        kept, self.kept = self.kept, np.zeros(0, np.int32)
        for slot in kept[kept >= 0].tolist():
            self.pool.release(slot)

    def keep(self, length: int, keys: Sequence[bytes]) -> None:
        """Make a snapshot: a stretch before the boundary of a prompt that was just read, else at it."""
        if self._new and self._earlier_at // BLOCK <= len(keys):
            self.earlier = self.pool.publish(self.earlier, keys[self._earlier_at // BLOCK - 1])
        elif self.at and self.at // BLOCK <= len(keys):
            self.boundary = self.pool.publish(self.boundary, keys[self.at // BLOCK - 1])
        self._new = False

    def finds(self, key: bytes) -> bool:
        """Whether a prefix may go on over this block: only its end has to be there (`longest`)."""
        return True

    def _slot(self, n: int, own: int, keys: Sequence[bytes]) -> int | None:
        """The slot of the state behind n tokens."""
        if n == 0:
            return -1
        if n == self.length <= own:
            return self.current
        if n == self.at <= own:
            return self.boundary
        if n == self._earlier_at <= own:
            return self.earlier
        found = n % BLOCK == 0 and n // BLOCK <= len(keys)
        return self.pool.find(keys[n // BLOCK - 1]) if found else None

    def longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest beginning of n tokens whose state is there.

        own: tokens that agree with its own. keys: of the full blocks of what is wanted.
        """
        while self._slot(n, own, keys) is None:
            below = (n - 1) // BLOCK * BLOCK
            n = own if below < own < n else below
        return n

    def take(self, n: int, own: int, keys: Sequence[bytes]) -> None:
        """Hold the state behind n tokens, `longest` having allowed it."""
        slot = self._slot(n, own, keys)
        assert slot is not None
        boundary, at = (self.boundary, self.at) if 0 < self.at < n and self.at <= own else (-1, 0)
        there = 0 < self._earlier_at < n and self._earlier_at <= own
        earlier, earlier_at = (self.earlier, self._earlier_at) if there else (-1, 0)
        for kept in (slot, boundary, earlier):
            if kept >= 0:
                self.pool.retain(kept)
        self.free()
        self.current, self.length, self.boundary, self.at = slot, n, boundary, at
        self.earlier, self._earlier_at = earlier, earlier_at

    def own(self) -> None:
        """Nothing: no slot is ever written twice."""

    def blocks_of(self, length: int) -> int:
        """Slots that are saved of so many tokens."""
        return len(self._places)

    def places(self, length: int) -> list[int]:
        """Numbers of tokens behind which the states are that go on disk: the last, and the one to go back
        to.
        """
        return [length, *([self._earlier_at] if self.earlier >= 0 else [])] if length else []

    def expect(self, places: Sequence[int]) -> None:
        """These are the places of states that are going to be restored. Raises ValueError if they make no
        sense.
        """
        length, *earlier = places
        if len(earlier) > 1 or not all(0 < at < length and at % BLOCK == 0 for at in earlier):
            raise ValueError("places")
        self._places = tuple(places)

    def saved(self, length: int) -> list[int]:
        """Slots that go on disk."""
        return [slot for slot in (self.current, self.earlier) if slot >= 0] if length else []

    def make(self, length: int) -> None:
        """Have slots for the states of a branch that is going to be restored. Raises PoolExhaustedError."""
        self.current, self.length = self.pool.allocate(), length
        for at in self._places[1:]:
            self.earlier, self._earlier_at = self.pool.allocate(), at

    def fits(self, length: int) -> bool:
        """Whether its state is the one behind so many tokens."""
        there = self.length == length and (self.current >= 0) == (length > 0)
        return there and max(self.at, self._earlier_at) < max(length, 1)

    def trim(self, length: int) -> None:
        """Give back what a step was going to write."""
        self._drop_kept()

    def fork(self) -> State:
        """The same, shared."""
        other = State(self.pool, self.spacing, self.stretch)
        for name in ("current", "length", "boundary", "at", "earlier", "_earlier_at"):
            setattr(other, name, getattr(self, name))
        for slot in other.held():
            self.pool.retain(slot)
        return other

    def free(self) -> None:
        """Give every slot back."""
        held = self.held()
        self.forget()
        for slot in held:
            self.pool.release(slot)

    def forget(self) -> None:
        """Hold nothing, and give nothing back: the pool is going to be counted anew."""
        self.current = self.boundary = self.earlier = -1
        self.length = self.at = self._earlier_at = 0
        self.kept, self._ends, self._new = np.zeros(0, np.int32), [], False
