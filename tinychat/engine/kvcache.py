"""A paged KV cache: a pool of blocks, block tables, reference counts, copy-on-write, prefix reuse by content.

Only bookkeeping lives here; the numbers live in the backend's pool. A block is found again by a hash of every
token id up to its end, so branches of a conversation, later turns and other sessions share what they have in
common. A block that nobody holds stays findable until its room is needed, oldest first.

A branch may give up slots (`tinychat.engine.eviction` says which). From then on its blocks are its own: what
they hold is no longer a function of the token ids alone, so they are neither shared nor found by content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tinychat.backends.interface import BLOCK
from tinychat.engine.eviction import Ledger, Votes


class PoolExhaustedError(Exception):
    """Every block is held by a branch, or this branch had to give its own to others."""


class BlockPool:
    """Which blocks are free, held (and by how many), or kept for reuse."""

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
        idle = dict.fromkeys((*self._idle, *self._key_of))
        self._idle = OrderedDict.fromkeys(b for b in idle if b in self._key_of and not held[b])
        self._free = [b for b in reversed(range(self.n_blocks)) if not held[b] and b not in self._key_of]

    def allocate(self) -> int:
        """A block with one reference; reclaims the oldest idle block if none is free. Raises
        PoolExhaustedError.
        """
        if not self.available():
            raise PoolExhaustedError
        if self._free and (self.used < self._usual or not self._idle):
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
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
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that hold something, findable idle ones included."""
        self._collect()
        return self.n_blocks - len(self._free)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading elements agree."""
    n = min(len(a), len(b))
    x, y = np.asarray(a[:n], dtype=np.int64), np.asarray(b[:n], dtype=np.int64)
    different = np.flatnonzero(x != y)
    return int(different[0]) if len(different) else n


class Branch:
    """One sequence in the cache: its token ids, and the blocks that hold their keys and values.

    `evicted` of the ids have no slot any more; with a ledger, eviction may begin.
    """

    def __init__(self, pool: BlockPool, root_key: bytes = b"", ledger: Ledger | None = None):
        self.pool, self.table = pool, []
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
        """Slots in use."""
        return len(self.ids) - self.evicted

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.ledger.next_position if self.ledger else len(self.ids)

    def match(self, ids: Sequence[int], limit: int | None = None) -> int:
        """Keep or find the longest cached prefix of `ids`; afterwards `len(self)` is its length, which is
        returned. Of what other branches left, not more than the first `limit` tokens.

        Votes of tokens that are no longer there cannot be taken back: where a policy counts them and nothing
        was given up yet, the branch begins again with what is found, as if the other words were never said.
        """
        same = common_prefix(self.ids, ids)
        voted = self.ledger is not None and self.ledger.seen > 0
        if same < self._floor or (voted and not self.evicted and same < len(self.ids)):
            self.free()
        self.truncate(same)
        if self.evicted:
            return len(self.ids)
        start = len(self.ids) // BLOCK
        keys = self._keys[:start]
        found = []
        for i in range(start, (len(ids) if limit is None else min(len(ids), limit)) // BLOCK):
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
            held = len(self.ids)
            self.ids = array("i", ids[: len(self.table) * BLOCK])
            if self.ledger:
                self.ledger.append(len(self.ids) - held)
        return len(self.ids)

    def may_rewind(self, prompt: Sequence[int]) -> bool:
        """Whether the branch has read exactly this prompt, and nothing was given up since."""
        votes = self.ledger and self.ledger.remembered
        n = len(prompt)
        return bool(votes) and votes.size + self.evicted == n and common_prefix(self.ids, prompt) == n

    def rewind(self, prompt: Sequence[int]) -> Votes | None:
        """If this is the prompt that was read last: go back to before its last token. That token votes no
        second time; when it has run, `Ledger.recall` takes what is returned.
        """
        if not self.may_rewind(prompt):
            return None
        votes = self.ledger.remembered
        self.truncate(len(prompt) - 1)
        return votes

    def reserve(self, n: int) -> None:
        """Have private room for n more tokens. Raises PoolExhaustedError; then nothing has changed but
        copies.
        """
        last, offset = divmod(self.slots, BLOCK)
        if offset and n and not self.pool.is_private(self.table[last]):
            self.table[last] = self.pool.duplicate(self.table[last])
        needed = -(-(self.slots + n) // BLOCK) - len(self.table)
        if needed > self.pool.available():
            raise PoolExhaustedError
        self.table.extend(self.pool.allocate() for _ in range(needed))

    def commit(self, ids: Sequence[int]) -> None:
        """The backend has written keys and values for `ids`; room beyond them is given back. The ledger is
        told by who has the scores.
        """
        self.ids.extend(ids)
        self._release_from(-(-self.slots // BLOCK))
        if self.evicted:
            return
        for i in range(len(self._keys), len(self.ids) // BLOCK):
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(self._key(previous, self.ids[i * BLOCK : (i + 1) * BLOCK]))
            self.table[i] = self.pool.publish(self.table[i], self._keys[-1])

    def truncate(self, n: int) -> None:
        """Forget everything after the first n tokens (rollback). Raises ValueError where an eviction came in
        between.
        """
        if n >= len(self.ids):
            return
        if n < self._floor:
            raise ValueError(f"{n} tokens: the branch was thinned out at {self._floor}")
        del self.ids[n:]
        self._release_from(-(-self.slots // BLOCK))
        del self._keys[n // BLOCK :]
        if self.ledger:
            self.ledger.truncate(self.slots)

    def own(self) -> None:
        """Make every block private, before slots are given up. Raises PoolExhaustedError; what is done
        stays.
        """
        for i, block in enumerate(self.table):
            if self.pool.holders(block) == 1:
                self.pool.withdraw(block)
            else:
                self.table[i] = self.pool.duplicate(block)

    def give_up(self, n: int, value: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """n slots (a multiple of BLOCK) of each layer and KV head are no longer needed; every block is
        private.

        value, and what is returned (slots that the backend has to move): as of `Ledger.evict`. The table
        still has the last blocks.
        """
        moves = self.ledger.evict(n, value)
        self.evicted += n
        self._floor = len(self.ids)
        self._keys = []
        return moves

    def reindex(self) -> np.ndarray:
        """Positions become consecutive; every block is private. Returns what the backend has to turn keys by,
        as `Ledger.reindex` does.
        """
        self._floor = len(self.ids)
        return self.ledger.reindex()

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

    def repair(self) -> None:
        """After a change that an exception may have left half-done, before `BlockPool.rebuild`: what the
        branch holds fits together again, or it holds nothing.
        """
        needed = -(-self.slots // BLOCK)
        fits = (
            self._whole
            and 0 <= needed <= len(self.table)
            and len(self._keys) <= (0 if self.evicted else len(self.ids) // BLOCK)
            and (self.ledger is None or self.ledger.size == self.slots)
        )
        if fits:
            del self.table[needed:]
        else:
            self.table = []
            self.free()

    def restore(self, ids: Sequence[int], evicted: int) -> None:
        """The backend has filled the reserved blocks with what was saved of `ids`, `evicted` of them given
        up; what was saved of the ledger comes behind.
        """
        self.evicted = evicted
        self._floor = len(ids) if evicted else 0
        self.commit(ids)
        if self.ledger and not evicted:
            self.ledger.append(len(ids))

    def drop_empty_blocks(self) -> None:
        """Give back the blocks behind the last slot, once the backend has moved what they held."""
        self._release_from(-(-self.slots // BLOCK))

    def fork(self) -> Branch:
        """A second branch that shares every block until one of them writes."""
        other = self._empty()
        other.ids, other.table, other._keys = self.ids[:], list(self.table), list(self._keys)
        other.evicted, other._floor = self.evicted, self._floor
        other.ledger = self.ledger and self.ledger.copy()
        for block in other.table:
            self.pool.retain(block)
        return other

    def free(self) -> None:
        """Give every block back; what is indexed can still be found by content."""
        for block in reversed(self.table):  # the end of a sequence is reclaimed before its beginning
            self.pool.release(block)
        self.ids, self.table, self._keys = array("i"), [], []
        self.evicted = self._floor = 0
        if self.ledger:
            self.ledger.clear()
        self._whole = True

    def _empty(self) -> Branch:
        return Branch(self.pool, self._root)

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
