"""A paged KV cache: a pool of blocks, block tables, reference counts, copy-on-write, prefix reuse by content.

Only bookkeeping lives here; the numbers live in the backend's pool. A block is found again by a hash of every
token id up to its end, so branches of a conversation, later turns and other sessions share what they have in
common. A block that nobody holds stays findable until its room is needed, oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from tinychat.backends import BLOCK


class PoolExhaustedError(Exception):
    """Every block is held by a branch."""


class BlockPool:
    """Which blocks are free, held (and by how many), or kept for reuse."""

    def __init__(self, n_blocks: int, copy_block: Callable[[int, int], None]):
        self.n_blocks = n_blocks
        self.copy_block = copy_block
        self._free = list(range(n_blocks - 1, -1, -1))
        self._refs = [0] * n_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed blocks without a holder, oldest first

    def allocate(self) -> int:
        """A block with one reference; reclaims the oldest idle block if none is free. Raises
        PoolExhaustedError.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            raise PoolExhaustedError
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more holder."""
        self._idle.pop(block, None)
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One holder fewer; without holders it is free, or idle when it can be found by content."""
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> int:
        """Make a full block findable; the block to hold from now on. A content is kept once: where another block
        has it already, the caller's reference moves to that one.
        """
        first = self._block_of.setdefault(key, block)
        if first == block:
            self._key_of[block] = key
        else:
            self.retain(first)
            self.release(block)
        return first

    def find(self, key: bytes) -> int | None:
        """The block with that content, if it is still there."""
        return self._block_of.get(key)

    def is_private(self, block: int) -> bool:
        """Whether the only holder may overwrite it."""
        return self._refs[block] == 1 and block not in self._key_of

    @property
    def available(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that hold something, findable idle ones included."""
        return self.n_blocks - len(self._free)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading elements agree."""
    n = min(len(a), len(b))
    x, y = np.asarray(a[:n], dtype=np.int64), np.asarray(b[:n], dtype=np.int64)
    different = np.flatnonzero(x != y)
    return int(different[0]) if len(different) else n


class Branch:
    """One sequence in the cache: the token ids whose keys and values are there, and the blocks that hold
    them.
    """

    def __init__(self, pool: BlockPool, root_key: bytes = b""):
        self.pool = pool
        self.ids: list[int] = []
        self.table: list[int] = []
        self._keys: list[bytes] = []  # of the full blocks
        self._root = root_key

    def __len__(self) -> int:
        return len(self.ids)

    def match(self, ids: Sequence[int]) -> int:
        """Keep or find the longest cached prefix of `ids`; afterwards `len(self)` is its length, which is
        returned.
        """
        self.truncate(common_prefix(self.ids, ids))
        start = len(self.ids) // BLOCK
        keys = self._keys[:start]
        found = []
        for i in range(start, len(ids) // BLOCK):
            key = self._key(keys[-1] if keys else self._root, ids[i * BLOCK : (i + 1) * BLOCK])
            block = self.pool.find(key)
            if block is None:
                break
            keys.append(key)
            found.append(block)
        if found:
            for block in found:
                self.pool.retain(block)
            for block in self.table[start:]:
                self.pool.release(block)
            self.table[start:] = found
            self._keys = keys
            self.ids = list(ids[: len(self.table) * BLOCK])
        return len(self.ids)

    def reserve(self, n: int) -> None:
        """Have private room for n more tokens. Raises PoolExhaustedError; then nothing has changed but
        copies.
        """
        last, offset = divmod(len(self.ids), BLOCK)
        if offset and n and not self.pool.is_private(self.table[last]):
            fresh = self.pool.allocate()
            self.pool.copy_block(self.table[last], fresh)
            self.pool.release(self.table[last])
            self.table[last] = fresh
        needed = -(-(len(self.ids) + n) // BLOCK) - len(self.table)
        if needed > self.pool.available:
            raise PoolExhaustedError
        self.table.extend(self.pool.allocate() for _ in range(needed))

    def commit(self, ids: Sequence[int]) -> None:
        """The backend has written keys and values for `ids`; room beyond them is given back."""
        self.ids.extend(ids)
        self._release_from(-(-len(self.ids) // BLOCK))
        for i in range(len(self._keys), len(self.ids) // BLOCK):
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(self._key(previous, self.ids[i * BLOCK : (i + 1) * BLOCK]))
            self.table[i] = self.pool.publish(self.table[i], self._keys[-1])

    def truncate(self, n: int) -> None:
        """Forget everything after the first n tokens (rollback)."""
        if n >= len(self.ids):
            return
        del self.ids[n:]
        self._release_from(-(-n // BLOCK))
        del self._keys[n // BLOCK :]

    def fork(self) -> Branch:
        """A second branch that shares every block until one of them writes."""
        other = Branch(self.pool, self._root)
        other.ids, other.table, other._keys = list(self.ids), list(self.table), list(self._keys)
        for block in other.table:
            self.pool.retain(block)
        return other

    def free(self) -> None:
        """Give every block back; what is indexed can still be found by content."""
        for block in reversed(self.table):  # the end of a sequence is reclaimed before its beginning
            self.pool.release(block)
        self.ids, self.table, self._keys = [], [], []

    def block_table(self) -> np.ndarray:
        """int32 [n blocks], for a backend's Step."""
        return np.asarray(self.table, dtype=np.int32)

    def _release_from(self, i: int) -> None:
        for block in self.table[i:]:
            self.pool.release(block)
        del self.table[i:]

    @staticmethod
    def _key(previous: bytes, ids: Sequence[int]) -> bytes:
        content = previous + np.asarray(ids, dtype=np.int32).tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()
