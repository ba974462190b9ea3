"""Part of a branch in a paged memory: a block for every 16 of its slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.backends.interface import BLOCK, Slots
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError


class Paged:
    """A block table. Lengths are in slots; tokens and slots are the same until some are given up."""

    thinned = True  # eviction takes slots of it

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.table: list[int] = []

    def held(self) -> list[int]:
        """Blocks that it has a reference to."""
        return list(self.table)

    def reserve(self, length: int, n: int, each: bool = False) -> None:
        """Have private room for n more. Raises PoolExhaustedError."""
        last, offset = divmod(length, BLOCK)
        if offset and n and not self.pool.is_private(self.table[last]):
            self.table[last] = self.pool.duplicate(self.table[last])
        needed = -(-(length + n) // BLOCK) - len(self.table)
        if needed > self.pool.available():
            raise PoolExhaustedError(self.pool)
        self.table.extend(self.pool.allocate() for _ in range(needed))

    def span(self, length: int, scores: np.ndarray | None = None, scored_rows: int = 0) -> Slots:
        """Slots for a step's rows, and those that they see."""
        return Slots(np.asarray(self.table, dtype=np.int32), length, scores, scored_rows)

    def publish(self, i: int, key: bytes) -> None:
        """Block i is full, and this is what it holds."""
        self.table[i] = self.pool.publish(self.table[i], key)

    def commit(self, before: int, length: int, keys: Sequence[bytes]) -> None:
        """So many are there now; room beyond them is given back."""
        self.trim(length)

    def keep(self, length: int, keys: Sequence[bytes]) -> None:
        """Nothing: what it holds stays findable as it is."""

    def finds(self, key: bytes) -> bool:
        """Whether a block of that content is there."""
        return self.pool.find(key) is not None

    def longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest beginning of n tokens that is there: all of it, since every key was found."""
        return n

    def take(self, n: int, own: int, keys: Sequence[bytes]) -> None:
        """Hold the first n: the first `own` are its own already, the others are found by their keys."""
        if n <= own:
            return self.trim(n)
        start = own // BLOCK
        found = [self.pool.hold(key) for key in keys[start : n // BLOCK]]
        for block in self.table[start:]:
            self.pool.release(block)
        self.table[start:] = found

    def own(self) -> None:
        """Make every block private. Raises PoolExhaustedError; what is done stays."""
        for i, block in enumerate(self.table):
            if self.pool.holders(block) == 1:
                self.pool.withdraw(block)
            else:
                self.table[i] = self.pool.duplicate(block)

    def blocks_of(self, length: int) -> int:
        """Blocks that are saved of so many slots."""
        return -(-length // BLOCK)

    def saved(self, length: int) -> list[int]:
        """Blocks that go on disk."""
        return self.held()

    def make(self, length: int) -> None:
        """Have the blocks of a branch that is going to be restored. Raises PoolExhaustedError."""
        self.reserve(0, length)

    def fits(self, length: int) -> bool:
        """Whether it holds what so many slots need, or more."""
        return 0 <= -(-length // BLOCK) <= len(self.table)

    def trim(self, length: int) -> None:
        """Give back the blocks behind the last slot."""
        needed = -(-length // BLOCK)
        for block in self.table[needed:]:
            self.pool.release(block)
        del self.table[needed:]

    def fork(self) -> Paged:
        """The same, shared until one of both writes."""
        other = Paged(self.pool)
        other.table = list(self.table)
        for block in other.table:
            self.pool.retain(block)
        return other

    def free(self) -> None:
        """Give every block back; the end of a sequence is reclaimed before its beginning."""
        for block in reversed(self.table):
            self.pool.release(block)
        self.table = []

    def forget(self) -> None:
        """Hold nothing, and give nothing back: the pool is going to be counted anew."""
        self.table = []
