"""The memories of one backend: a pool for each, what an empty branch has in them, and what eviction does to
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from tinychat.backends.interface import BLOCK, Backend, tail_of
from tinychat.base.errors import MemoryBudgetError
from tinychat.engine.eviction import EvictionPolicy, Ledger
from tinychat.engine.memory.branch import Branch, Part
from tinychat.engine.memory.paged import Paged
from tinychat.engine.memory.pool import BlockPool
from tinychat.engine.memory.sizes import blocks_at_first, blocks_of_one, new_parts, snapshot_spacing
from tinychat.engine.memory.tail import Tail
from tinychat.engine.memory.window import Window


class Memories:
    """`pools` are in the order of `Backend.memories`."""

    def __init__(self, backend: Backend, n_ctx: int, more_bytes: Callable[[], int]):
        """n_ctx: tokens for which there is room at first. more_bytes: how much memory there is that the pools
        do not have yet.
        """
        self.backend, self.n_ctx, self.more_bytes = backend, n_ctx, more_bytes
        self.pools: list[BlockPool] = []
        for memory, spec in enumerate(backend.memories):
            n = blocks_at_first(spec, n_ctx, backend.max_rows)
            backend.allocate_kv(n, memory)
            self.pools.append(BlockPool(n, partial(backend.copy_block, memory=memory)))
        self._spacing = snapshot_spacing(backend)
        # The memory that eviction takes slots of, if there is one.
        self._paged = next((i for i, spec in enumerate(backend.memories) if spec.kind == "paged"), None)

    def parts(self) -> list[Part]:
        """Parts of an empty branch, one for each memory."""
        return new_parts(self.backend.memories, self.pools, self._spacing)

    def ledger(self, policy: EvictionPolicy) -> Ledger:
        """Ledger of an empty branch. Where nothing is paged it has no layers and only renumbers."""
        return Ledger(policy, *((0, 1) if self._paged is None else self.backend.kv_heads(self._paged)))

    def rebuild(self, branches: Iterable[Branch]) -> None:
        """Count anew what these branches, which are all, hold."""
        branches = list(branches)
        for memory, pool in enumerate(self.pools):
            pool.rebuild([branch.parts[memory].held() for branch in branches])

    def used_bytes(self) -> int:
        """Bytes of blocks and slots that hold something."""
        used = enumerate(pool.used for pool in self.pools)
        return sum(n * self.backend.kv_bytes_per_block(memory) for memory, n in used)

    def grow(self, pool: BlockPool, part: int) -> bool:
        """Make a pool half as large again, in at most this part of the memory that is free."""
        memory = self.pools.index(pool)
        affordable = self.more_bytes() // self.backend.kv_bytes_per_block(memory) // part
        n = min(pool.n_blocks // 2 + 1, affordable)
        if n <= 0:
            return False
        try:
            self.backend.allocate_kv(pool.n_blocks + n, memory)
        except MemoryBudgetError:
            return False
        pool.grow(n)
        return True

    def would_fit(self, n: int, others: Iterable[Branch]) -> bool:
        """Whether there is room for n tokens beside what these hold; beside nobody, there always is."""
        others, n = list(others), min(n, self.n_ctx)
        for memory, pool in enumerate(self.pools):
            needed = blocks_of_one(self.backend.memories[memory], n, self.backend.max_rows)
            if pool.n_blocks - len({b for other in others for b in other.parts[memory].held()}) < needed:
                return False
        return True

    def give_up(self, branch: Branch, n: int) -> None:
        """n slots (a multiple of BLOCK) fewer in the paged memory; what it has there is private."""
        ledger, memory, value = branch.ledger, self._paged, None
        assert ledger is not None
        if memory is None:
            branch.give_up(n)
            return
        table = np.array(branch.parts[memory].held(), np.int32)
        slots, exact = branch.slots, self._exact(branch, memory)
        if ledger.watches:
            votes = ledger.votes()
            with np.errstate(over="ignore", invalid="ignore"):  # a damaged model's values
                value = votes * self.backend.value_spread(table, votes, memory, exact)
        with branch.rewritten():
            tail, moves = self._tail(branch, memory), branch.give_up(n, value)
            fresh = tail.opened(len(table)) if tail else None
            self.backend.move_slots(table, *moves, memory, slots, exact, fresh)
        branch.drop_empty_blocks()

    def _tail(self, branch: Branch, memory: int) -> Tail | None:
        tail = tail_of(self.backend.memories, memory)
        part = None if tail is None else branch.parts[tail]
        assert part is None or isinstance(part, Tail)
        return part

    def _exact(self, branch: Branch, memory: int) -> np.ndarray | None:
        """Exact forms of the blocks that the branch has in a memory; None: it has no tail."""
        tail, part = self._tail(branch, memory), branch.parts[memory]
        if tail is None:
            return None
        assert isinstance(part, Paged | Window)
        first = part.first if isinstance(part, Window) else 0
        return tail.exact(first + len(part.held()))[first:]

    def renumber(self, branch: Branch) -> None:
        """Positions become consecutive, and keys turn; everything that it has is private."""
        with branch.rewritten():
            for memory, turns in enumerate(branch.reindex()):
                part = branch.parts[memory]
                held = np.array(part.held(), np.int32)
                if not isinstance(part, Paged | Window) or not len(held):
                    continue
                if isinstance(turns, int):
                    first = part.first if isinstance(part, Window) else 0
                    shape = (*self.backend.kv_heads(memory), branch.filled(part) - first * BLOCK)
                    turns = np.full(shape, turns, np.int32)
                self.backend.turn_keys(held, turns, memory, self._exact(branch, memory))
