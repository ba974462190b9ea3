"""Part of a branch in a tail memory: the newest keys and values of another memory in 16 bits.

Where a cache keeps complete blocks in 4 bits, a row reads the block that it lies in exactly: what a row sees
follows from its position alone, not from how its sequence was cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.backends.interface import BLOCK, Tails
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError


class Tail:
    """Exact copies of the block that is being filled and of the one before it, which was filled last: drafts
    that cross its end are taken back. Lengths and block numbers are those of the memory that it belongs to.
    """

    def __init__(self, pool: BlockPool, thinned: bool):
        """thinned: whether eviction takes slots of the memory that it belongs to."""
        self.pool, self.thinned = pool, thinned
        self._blocks: dict[int, int] = {}  # by the number of the block that they are the exact form of
        self._written = np.zeros(0, np.int32)  # what the step in preparation leaves, of blocks from here on:
        self._first = 0

    def held(self) -> list[int]:
        """Blocks that it has a reference to."""
        return list(self._blocks.values())

    def last(self, length: int) -> int:
        """The exact form of the block in which so many slots end; -1 where they end with a whole one."""
        return self._blocks[length // BLOCK] if length % BLOCK else -1

    def reserve(self, length: int, n: int, each: bool = False) -> None:
        """Have private room for n more: for the block that they end in; for each of them where the step
        verifies drafts. Raises PoolExhaustedError.
        """
        self.trim(length)
        first, end = length // BLOCK, -(-(length + n) // BLOCK)
        if length % BLOCK and n and not self.pool.is_private(self._blocks[first]):
            self._blocks[first] = self.pool.duplicate(self._blocks[first])
        wanted = range(first, end) if each else range((length + n) // BLOCK, end)
        missing = [i for i in wanted if i not in self._blocks]
        if len(missing) > self.pool.available():
            raise PoolExhaustedError(self.pool)
        for i in missing:
            self._blocks[i] = self.pool.allocate()
        self._first = first
        self._written = np.array([self._blocks.get(i, -1) for i in range(first, end)], np.int32)

    def span(self, length: int, scores: np.ndarray | None = None, scored_rows: int = 0) -> Tails:
        """Blocks that rows behind so many slots are written to."""
        return Tails(self._written[length // BLOCK - self._first :])

    def publish(self, i: int, key: bytes) -> None:
        """Nothing: what is exact is never shared by its content."""

    def commit(self, before: int, length: int, keys: Sequence[bytes]) -> None:
        """So many slots are there now; room beyond them is given back."""
        self.trim(length)

    def keep(self, length: int, keys: Sequence[bytes]) -> None:
        """Nothing: who goes on from a snapshot begins with a whole block."""

    def finds(self, key: bytes) -> bool:
        """Whether a prefix may go on over this block: nothing exact is needed behind a whole one."""
        return True

    def longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest beginning of n slots behind which one can go on: up to a whole block, or to where its
        last block is there exactly.

        own: slots that agree with its own.
        """
        return n if n <= own and n // BLOCK in self._blocks else n // BLOCK * BLOCK

    def take(self, n: int, own: int, keys: Sequence[bytes]) -> None:
        """Hold what the first n slots need, `longest` having allowed it."""
        if n > own:
            self.free()
        self.trim(n)

    def thin(self, length: int) -> None:
        """Eviction has left so many slots: the last block is another one, and nobody goes back behind it."""
        last = self._blocks.pop(max(self._blocks)) if length % BLOCK else None
        self.free()
        if last is not None:
            self._blocks = {length // BLOCK: last}

    def own(self) -> None:
        """Make every block private. Raises PoolExhaustedError; what is done stays."""
        for i, block in self._blocks.items():
            if self.pool.holders(block) > 1:
                self._blocks[i] = self.pool.duplicate(block)

    def blocks_of(self, length: int) -> int:
        """Blocks that are saved of so many slots."""
        return int(length % BLOCK > 0)

    def saved(self, length: int) -> list[int]:
        """Blocks that go on disk."""
        return [self._blocks[length // BLOCK]] if length % BLOCK else []

    def make(self, length: int) -> None:
        """Have the block of a branch that is going to be restored. Raises PoolExhaustedError."""
        if length % BLOCK:
            self._blocks = {length // BLOCK: self.pool.allocate()}

    def fits(self, length: int) -> bool:
        """Whether it holds what so many slots need."""
        return length % BLOCK == 0 or length // BLOCK in self._blocks

    def trim(self, length: int) -> None:
        """Give back what lies behind the last slot, and before the block that was filled last."""
        self._written = np.zeros(0, np.int32)
        for i in list(self._blocks):
            if not length // BLOCK - 1 <= i < -(-length // BLOCK):
                self.pool.release(self._blocks.pop(i))

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
        self._blocks, self._written = {}, np.zeros(0, np.int32)
