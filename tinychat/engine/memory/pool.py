"""A pool of blocks: reference counts, copy-on-write, reuse by content, snapshots that outlive a branch."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class PoolExhaustedError(Exception):
    """Every block of a pool is held by a branch, or this branch had to give its own to others."""

    def __init__(self, pool: BlockPool | None = None):
        super().__init__()
        self.pool = pool


class BlockPool:
    """Accounts of blocks: free, held (and by how many), or kept for reuse.

    A block that nobody holds and that can be found by its content stays until its room is needed, oldest
    first; those of a snapshot stay longer, until nothing else is left, the oldest snapshot first.
    """

    def __init__(self, n_blocks: int, copy_block: Callable[[int, int], None]):
        self.n_blocks = n_blocks
        # With so many in use, a new content takes the place of the oldest idle one although a pool that has
        # grown may have blocks that were never touched: what nobody holds is not worth more memory.
        self._usual = n_blocks
        self.copy_block = copy_block
        self._free = list(range(n_blocks - 1, -1, -1))
        self._refs = [0] * n_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed blocks without a holder, oldest first
        self._pinned: OrderedDict[int, None] = OrderedDict()  # likewise, those of snapshots
        self._snapshots: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()  # by last key, oldest first
        self._pins: Counter[bytes] = Counter()  # snapshots that want a content
        self._abandoned: deque[list[int]] = deque()  # tables of branches that are no more

    def grow(self, n: int) -> None:
        """The backend has n blocks more."""
        self._free[:0] = range(self.n_blocks + n - 1, self.n_blocks - 1, -1)
        self._refs += [0] * n
        self.n_blocks += n

    def abandon(self, table: list[int]) -> None:
        """The holder of these blocks is gone. May be called by any thread, in the middle of anything: they
        are released before anything is asked of the pool.
        """
        self._abandoned.append(table)

    def _collect(self) -> None:
        while self._abandoned:
            for block in reversed(self._abandoned.popleft()):
                self.release(block)

    def rebuild(self, tables: Iterable[list[int]]) -> None:
        """Count anew what these tables, which are all, hold: an exception may have come between two steps of
        a change.
        """
        self._abandoned.clear()
        held = Counter(block for table in tables for block in table)
        self._refs = [held[block] for block in range(self.n_blocks)]
        self._key_of = {b: key for b, key in self._key_of.items() if self._block_of.get(key) == b}
        self._block_of = {key: b for b, key in self._key_of.items()}
        self._pins = Counter(key for keys in self._snapshots.values() for key in keys)
        idle = dict.fromkeys((*self._idle, *self._pinned, *self._key_of))
        unheld = [b for b in idle if b in self._key_of and not held[b]]
        self._idle = OrderedDict.fromkeys(b for b in unheld if not self._pins[self._key_of[b]])
        self._pinned = OrderedDict.fromkeys(b for b in unheld if self._pins[self._key_of[b]])
        self._free = [b for b in reversed(range(self.n_blocks)) if not held[b] and b not in self._key_of]

    def allocate(self) -> int:
        """A block with one reference; reclaims the oldest idle block if none is free. Raises
        PoolExhaustedError.
        """
        if not self.available():
            raise PoolExhaustedError(self)
        if self._free and (self.used < self._usual or not self._idle):
            block = self._free.pop()
        else:
            while not self._idle:
                self._forget_snapshot()
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more holder."""
        if not self._refs[block]:
            self._idle.pop(block, None)
            self._pinned.pop(block, None)
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One holder fewer; without holders it is free, or idle when it can be found by content."""
        self._refs[block] -= 1
        if self._refs[block] == 0:
            key = self._key_of.get(block)
            if key is None:
                self._free.append(block)
            elif key in self._pins:
                self._pinned[block] = None
            else:
                self._idle[block] = None

    def duplicate(self, block: int) -> int:
        """A private copy of a block, which the caller holds in its place. Raises PoolExhaustedError, and what
        copying raises; then nothing has changed.
        """
        fresh = self.allocate()
        try:
            self.copy_block(block, fresh)
        except BaseException:
            self.release(fresh)
            raise
        self.release(block)
        return fresh

    def publish(self, block: int, key: bytes) -> int:
        """Make a full block findable; the block to hold from now on. A content is kept once: where another
        block has it already, the caller's reference moves to that one.
        """
        first = self._block_of.setdefault(key, block)
        if first == block:
            self._key_of[block] = key
        else:
            self.retain(first)
            self.release(block)
        return first

    def withdraw(self, block: int) -> None:
        """No longer findable: its only holder is going to overwrite it."""
        if key := self._key_of.pop(block, None):
            del self._block_of[key]

    def find(self, key: bytes) -> int | None:
        """The block with that content, if it is still there."""
        return self._block_of.get(key)

    def hold(self, key: bytes) -> int:
        """The block with that content, which is there, with one holder more."""
        block = self._block_of[key]
        self.retain(block)
        return block

    # Snapshots

    def snapshot(self, keys: Sequence[bytes]) -> None:
        """Keep these contents together until there is no other room. One with the same last key takes the
        place of the earlier one.
        """
        if not keys:
            return
        self._drop_snapshot(keys[-1])
        self._snapshots[keys[-1]] = tuple(keys)
        self._pins.update(keys)
        for block in map(self._block_of.get, keys):
            if block is not None and block in self._idle:
                del self._idle[block]
                self._pinned[block] = None
        if len(self._snapshots) > self.n_blocks:
            self._forget_snapshot()

    def _forget_snapshot(self) -> None:
        self._drop_snapshot(next(iter(self._snapshots)))

    def _drop_snapshot(self, last: bytes) -> None:
        for key in self._snapshots.pop(last, ()):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                block = self._block_of.get(key)
                if block is not None and block in self._pinned:
                    del self._pinned[block]
                    self._idle[block] = None

    # Counts

    def holders(self, block: int) -> int:
        """How many branches hold it."""
        self._collect()
        return self._refs[block]

    def is_private(self, block: int) -> bool:
        """Whether the only holder may overwrite it."""
        return self.holders(block) == 1 and block not in self._key_of

    def available(self) -> int:
        """Blocks that `allocate` can still give."""
        self._collect()
        return len(self._free) + len(self._idle) + len(self._pinned)

    @property
    def used(self) -> int:
        """Blocks that hold something, findable idle ones included."""
        self._collect()
        return self.n_blocks - len(self._free)
