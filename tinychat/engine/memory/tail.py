"""Part of a branch in a tail memory: what rows read exactly of another memory, in 16 bits.

Where a cache keeps complete blocks in 4 bits, a row reads the stretch that it lies in exactly, and the first
block: what a row sees follows from its position alone, not from how its sequence was cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.backends.interface import BLOCK, STRETCH, Tails
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError

WIDE = STRETCH // BLOCK  # blocks of a stretch


class Tail:
    """Exact copies of the blocks of the stretch that is being filled, of the one before it for a while, so
    that drafts that cross its end are taken back, and of the first block where rows read that. Lengths and
    block numbers are those of the memory that it belongs to.

    The first block is found by its content, like those of a paged memory: whoever goes on from a prefix
    needs it.
    """

    def __init__(self, pool: BlockPool, thinned: bool):
        """thinned: whether it belongs to a paged memory: eviction takes slots, and the first block is read
        exactly.
        """
        self.pool, self.thinned = pool, thinned
        self._blocks: dict[int, int] = {}  # by the number of the block that they are the exact form of
        self._step = np.zeros(0, np.int32)  # what the step in preparation reads and leaves
        self._fresh: dict[int, int] = {}  # likewise, blocks that are going to be opened from 4 bits

    def held(self) -> list[int]:
        """Blocks that it has a reference to."""
        return [*self._blocks.values(), *self._fresh.values()]

    def _needed(self, length: int) -> list[int]:
        """Numbers of the blocks that a row behind so many slots reads exactly, beside itself."""
        stretch = range(length // STRETCH * WIDE, -(-length // BLOCK))
        return [0, *stretch] if self.thinned and length >= STRETCH else list(stretch)

    def exact(self, n_blocks: int) -> np.ndarray:
        """Exact forms of the first n blocks, -1 where there is none: int32 [n]."""
        return np.array([self._blocks.get(i, -1) for i in range(n_blocks)], np.int32)

    def reserve(self, length: int, n: int, each: bool = False) -> None:
        """Have private room for n more: for the stretch that they begin in and the one they end in, and the
        first block; for each of them where the step verifies drafts. Raises PoolExhaustedError.
        """
        self.trim(length)
        first, end = length // BLOCK, -(-(length + n) // BLOCK)
        if length % BLOCK and n and not self.pool.is_private(self._blocks[first]):
            self._blocks[first] = self.pool.duplicate(self._blocks[first])
        begun = -(-length // STRETCH) * WIDE  # behind the stretch that is begun; the first one, too
        begun = max(begun, WIDE) if self.thinned and not length else begun
        last = (length + n) // STRETCH * WIDE
        wanted = [i for i in range(first, end) if each or i < begun or i >= last]
        self._blocks |= self._room([i for i in wanted if i not in self._blocks])
        self._step = self.exact(end)

    def span(self, length: int, scores: np.ndarray | None = None, scored_rows: int = 0) -> Tails:
        """Blocks that rows behind so many slots read and leave."""
        return Tails(self._step)

    def publish(self, i: int, key: bytes) -> None:
        """Make the first block findable; nothing else that is exact is shared by its content."""
        if i == 0 and self.thinned:
            self._blocks[0] = self.pool.publish(self._blocks[0], key)

    def commit(self, before: int, length: int, keys: Sequence[bytes]) -> None:
        """So many slots are there now; room beyond them is given back."""
        self.trim(length)

    def keep(self, length: int, keys: Sequence[bytes]) -> None:
        """Nothing: who goes on from a snapshot begins with a whole stretch."""

    def finds(self, key: bytes) -> bool:
        """Whether a prefix may go on over this block: only its end has to be there (`longest`)."""
        return True

    def longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest beginning of n slots behind which one can go on: up to a whole stretch, or to where its
        blocks are there exactly.

        own: slots that agree with its own. keys: of the full blocks of what is wanted.
        """
        if n <= own:
            return n if self.fits(n) else n // STRETCH * STRETCH
        whole = n // STRETCH * STRETCH
        if self.thinned and own < BLOCK and not (keys and self.pool.find(keys[0]) is not None):
            whole = 0
        return max(whole, own)

    def take(self, n: int, own: int, keys: Sequence[bytes]) -> None:
        """Hold what the first n slots need, `longest` having allowed it."""
        if n > own:
            first = self._blocks.pop(0, -1) if own >= BLOCK else -1
            self.free()
            if self.thinned:
                self._blocks = {0: self.pool.hold(keys[0]) if first < 0 else first}
            elif first >= 0:
                self.pool.release(first)
        self.trim(n)

    def thin(self, length: int, left: int) -> None:
        """Hold what so many slots need, before keys and values are rewritten, and nothing else, for that
        depends on how the branch came here; and room for what is needed besides where only so many are left.
        Raises PoolExhaustedError.
        """
        self.trim(length)
        for i in set(self._blocks).difference(self._needed(length)):
            self.pool.release(self._blocks.pop(i))
        self._fresh = self._room([i for i in self._needed(left) if i not in self._blocks])

    def opened(self, n_blocks: int) -> np.ndarray:
        """Hold what was fresh like the others: like `exact`, of these alone."""
        self._blocks |= self._fresh
        fresh, self._fresh = self._fresh, {}
        return np.array([fresh.get(i, -1) for i in range(n_blocks)], np.int32)

    def _room(self, numbers: Sequence[int]) -> dict[int, int]:
        if len(numbers) > self.pool.available():
            raise PoolExhaustedError(self.pool)
        return {i: self.pool.allocate() for i in numbers}

    def own(self) -> None:
        """Make every block private. Raises PoolExhaustedError; what is done stays."""
        for i, block in self._blocks.items():
            if self.pool.holders(block) == 1:
                self.pool.withdraw(block)
            else:
                self._blocks[i] = self.pool.duplicate(block)

    def blocks_of(self, length: int) -> int:
        """Blocks that are saved of so many slots."""
        return len(self._needed(length))

    def saved(self, length: int) -> list[int]:
        """Blocks that go on disk."""
        return [self._blocks[i] for i in self._needed(length)]

    def make(self, length: int) -> None:
        """Have the blocks of a branch that is going to be restored. Raises PoolExhaustedError."""
        self._blocks = self._room(self._needed(length))

    def fits(self, length: int) -> bool:
        """Whether it holds what so many slots need."""
        return all(i in self._blocks for i in self._needed(length))

    def trim(self, length: int) -> None:
        """Give back what lies behind the last slot, and before the stretch of the block filled last."""
        self._step = np.zeros(0, np.int32)
        first = max(0, length // BLOCK - 1) // WIDE * WIDE
        for i in list(self._blocks):
            stays = first <= i < -(-length // BLOCK) or (i == 0 < length and self.thinned)
            if not stays:
                self.pool.release(self._blocks.pop(i))
        while self._fresh:
            self.pool.release(self._fresh.popitem()[1])

    def fork(self) -> Tail:
        """The same, shared until one of both writes."""
        other = Tail(self.pool, self.thinned)
        other._blocks = dict(self._blocks)
        for block in other._blocks.values():
            self.pool.retain(block)
        return other

    def free(self) -> None:
        """Give every block back."""
        held = self.held()
        self.forget()
        for block in held:
            self.pool.release(block)

    def forget(self) -> None:
        """Hold nothing, and give nothing back: the pool is going to be counted anew."""
        self._blocks, self._step, self._fresh = {}, np.zeros(0, np.int32), {}
