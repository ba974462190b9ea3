"""Part of a branch in a window memory: the blocks of the last tokens, whatever the length of the branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.backends.interface import BLOCK, Slots
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError

SNAPSHOTS = 4  # windows that a pool has room for beside the one that is in use


class Window:
    """Blocks `first` to `end` of a table that is numbered like the tokens. What lies before is given back as
    the branch grows: it can be found by content until its room is needed.

    A snapshot is the blocks that the next token at some place would see, all of them full. That of the last
    prompt goes on disk too: where a thought is left out of a conversation, one goes on from before it.
    """

    thinned = False

    def __init__(self, pool: BlockPool, window: int, spacing: int, stretch: int = BLOCK):
        """spacing: tokens between two snapshots in a long text, a multiple of `stretch`: see MemorySpec."""
        self.pool, self.window, self.spacing, self.stretch = pool, window, spacing, stretch
        self.first = self.end = 0
        self._table = np.zeros(16, np.int32)  # what lies before `first` is of the past
        self._reads = False  # whether the step is a part of a prompt
        self._prompt: tuple[int, tuple[bytes, ...]] = (0, ())  # first block of its snapshot, and the keys
        self._at = 0  # tokens of a prompt whose snapshot is going to be restored
        self._earlier: dict[int, int] = {}  # blocks of a snapshot that is being restored, by their places

    def held(self) -> list[int]:
        """Blocks that it has a reference to."""
        return [*self._table[self.first : self.end].tolist(), *self._earlier.values()]

    def seen_from(self, n: int) -> int:
        """The first block that a token behind n others sees."""
        return max(0, n - self.window + 1) // BLOCK

    def reserve(self, length: int, n: int, each: bool = False) -> None:
        """Have private room for n more. Raises PoolExhaustedError."""
        self._reads = n > 1 and not each
        last, offset = divmod(length, BLOCK)
        if offset and n and not self.pool.is_private(block := int(self._table[last])):
            self._table[last] = self.pool.duplicate(block)
        self._extend(-(-(length + n) // BLOCK))

    def _extend(self, end: int) -> None:
        if end - self.end > self.pool.available():
            raise PoolExhaustedError(self.pool)
        if end > len(self._table):
            table = np.zeros(max(end, 2 * len(self._table)), np.int32)
            table[self.first : self.end] = self._table[self.first : self.end]
            self._table = table
        while self.end < end:
            self._table[self.end] = self.pool.allocate()
            self.end += 1

    def span(self, length: int, scores: np.ndarray | None = None, scored_rows: int = 0) -> Slots:
        """Slots for a step's rows, and those that they see."""
        return Slots(self._table[: self.end], length)

    def publish(self, i: int, key: bytes) -> None:
        """Block i is full, and this is what it holds."""
        if i >= self.first:
            self._table[i] = self.pool.publish(int(self._table[i]), key)
        elif i in self._earlier:
            self.pool.release(self.pool.publish(self._earlier.pop(i), key))

    def commit(self, before: int, length: int, keys: Sequence[bytes]) -> None:
        """So many are there now; room beyond them is given back, and what no token will see any more.

        In a prompt snapshots are taken on the way (those in an answer would drive the prompt's own out),
        where the branch can still be found by content.
        """
        self.trim(length)
        end = length // self.spacing * self.spacing
        if self._reads and end > before and len(keys) >= end // BLOCK:
            self.keep(end + 1, keys)
        # One stretch more stays: a drafting model takes a few tokens back.
        seen = min(max(0, self.seen_from(length) - self.stretch // BLOCK), self.end)
        while self.first < seen:
            self.first += 1
            self.pool.release(int(self._table[self.first - 1]))

    def keep(self, length: int, keys: Sequence[bytes]) -> None:
        """Take a snapshot from which the token behind the last whole stretch before `length` can go on."""
        full = min(length // BLOCK, len(keys))
        start = self.seen_from(max(0, length - 1) // self.stretch * self.stretch)
        # Where another branch's shorter memory was continued, less than a window may be there: no snapshot.
        if start < self.first:
            return
        self.pool.snapshot(keys[start:full])
        if self._reads and full:
            start = self._beginning(full * BLOCK)
            self._prompt = start, tuple(keys[start:full])

    def finds(self, key: bytes) -> bool:
        """Whether a prefix may go on over this block: only its end has to be there (`longest`)."""
        return True

    def _has(self, i: int, n: int, own: int) -> bool:
        """Whether it holds block i as far as n, when its first `own` tokens are what is wanted."""
        return self.first <= i < self.end and min((i + 1) * BLOCK, n) <= own

    def _missing(self, n: int, own: int, keys: Sequence[bytes]) -> int | None:
        """The last block that a token behind n others would see and that is nowhere."""
        for i in range(-(-n // BLOCK) - 1, self.seen_from(n) - 1, -1):
            full = (i + 1) * BLOCK <= n and i < len(keys)
            if not self._has(i, n, own) and not (full and self.pool.find(keys[i]) is not None):
                return i
        return None

    def longest(self, n: int, own: int, keys: Sequence[bytes]) -> int:
        """The longest beginning of n tokens behind which one can go on.

        own: tokens that agree with its own. keys: of the full blocks of what is wanted.
        """
        while (i := self._missing(n, own, keys)) is not None:
            n = own if i * BLOCK < own < min(n, (i + 1) * BLOCK) else i * BLOCK
        return n

    def take(self, n: int, own: int, keys: Sequence[bytes]) -> None:
        """Hold what a token behind the first n sees, `longest` having allowed it."""
        first, end = self.seen_from(n), -(-n // BLOCK)
        for _ in range(self.stretch // BLOCK):
            if first and self._has(first - 1, n, own):
                first -= 1
        blocks = []
        for i in range(first, end):
            if self._has(i, n, own):
                blocks.append(int(self._table[i]))
                self.pool.retain(blocks[-1])
            else:
                blocks.append(self.pool.hold(keys[i]))
        at, known = self._prompt
        still = tuple(keys[at : min(at + len(known), n // BLOCK)]) == known
        self.free()
        self._prompt = (at, known) if still else (0, ())
        self._hold(first, blocks)

    def _hold(self, first: int, blocks: Sequence[int]) -> None:
        end = first + len(blocks)
        table = np.zeros(max(16, end), np.int32)
        table[first:end] = blocks
        self._table, self.first, self.end = table, first, end

    def own(self) -> None:
        """Make every block private. Raises PoolExhaustedError; what is done stays."""
        for i in range(self.first, self.end):
            block = int(self._table[i])
            if self.pool.holders(block) == 1:
                self.pool.withdraw(block)
            else:
                self._table[i] = self.pool.duplicate(block)

    def expect(self, places: Sequence[int]) -> None:
        """The length of what is going to be restored, and of the prompt whose snapshot comes with it, if one
        does. Raises ValueError if they make no sense.
        """
        length, *prompt = places
        if len(prompt) > 1 or not all(0 < at < length and at % BLOCK == 0 for at in prompt):
            raise ValueError("places")
        self._at = prompt[0] if prompt else 0

    def blocks_of(self, length: int) -> int:
        """Blocks that are saved of so many tokens."""
        return -(-length // BLOCK) - self.seen_from(length) + len(self._before(length, self._at))

    def _before(self, length: int, at: int) -> range:
        """Blocks of the snapshot of a prompt of `at` tokens that none behind `length` others sees."""
        return range(self._beginning(at), min(at // BLOCK, self.seen_from(length))) if at else range(0)

    def _beginning(self, at: int) -> int:
        """First block of what is saved of a prompt of `at` tokens: its end may not come back, for it opens a
        thought perhaps, and states are kept a stretch before it.
        """
        return self.seen_from(max(0, at - 2 * self.stretch))

    def saved(self, length: int) -> list[int]:
        """Blocks that go on disk."""
        return self._table[self.seen_from(length) : self.end].tolist()

    def saved_prompt(self, length: int) -> tuple[int, list[int]]:
        """Tokens of the last prompt as far as its blocks are full, and those of its snapshot that go on disk
        beside the others: (0, []) where some are gone.
        """
        start, keys = self._prompt
        at = (start + len(keys)) * BLOCK
        if not 0 < at < length:
            return 0, []
        found = [self.pool.find(keys[i - start]) for i in self._before(length, at)]
        blocks = [block for block in found if block is not None]
        return (at, blocks) if blocks and len(blocks) == len(found) else (0, [])

    def make(self, length: int) -> None:
        """Have the blocks of a branch that is going to be restored, and of the snapshot of its last prompt
        those that there is room for, until they are published. Raises PoolExhaustedError.
        """
        self.first = self.end = self.seen_from(length)
        self._extend(-(-length // BLOCK))
        before = self._before(length, self._at)
        self._earlier = {i: self.pool.allocate() for i in before[: self.pool.available()]}

    def fits(self, length: int) -> bool:
        """Whether it holds what the next token sees, or more."""
        return self.first <= self.seen_from(length) and -(-length // BLOCK) <= self.end

    def trim(self, length: int) -> None:
        """Give back the blocks behind the last token."""
        needed = -(-length // BLOCK)
        while self.end > needed:
            self.end -= 1
            self.pool.release(int(self._table[self.end]))

    def fork(self) -> Window:
        """The same, shared until one of both writes."""
        other = Window(self.pool, self.window, self.spacing, self.stretch)
        other._prompt = self._prompt
        blocks = self.held()
        for block in blocks:
            self.pool.retain(block)
        other._hold(self.first, blocks)
        return other

    def free(self) -> None:
        """Give every block back; the end of a sequence is reclaimed before its beginning."""
        blocks = self.held()
        self.forget()
        for block in reversed(blocks):
            self.pool.release(block)

    def forget(self) -> None:
        """Hold nothing, and give nothing back: the pool is going to be counted anew."""
        self.first = self.end = 0
        self._prompt, self._earlier = (0, ()), {}
