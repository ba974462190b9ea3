"""The paged cache's bookkeeping against a plain model of what each sequence must read back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tinychat.backends.interface import BLOCK
from tinychat.engine.memory.branch import Branch, common_prefix
from tinychat.engine.memory.paged import Paged
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError

N_BLOCKS = 12


def new(pool):
    """A branch of a model that has this paged memory and no other."""
    return Branch([Paged(pool)])


def history(ids):
    """For each token a value that depends on it and on everything before it, as a key or value does."""
    out, so_far = [], 0
    for token in ids:
        so_far = hash((so_far, token))
        out.append(so_far)
    return out


class FakeBackend:
    """Stands in for the numbers: a slot holds the history of the token that was written to it."""

    def __init__(self, n_blocks):
        self.slots = [None] * (n_blocks * BLOCK)
        self.copies = 0

    def copy_block(self, src, dst):
        self.copies += 1
        self.slots[dst * BLOCK : (dst + 1) * BLOCK] = self.slots[src * BLOCK : (src + 1) * BLOCK]

    def slot(self, branch, i):
        return branch.parts[0].table[i // BLOCK] * BLOCK + i % BLOCK

    def write(self, branch, ids):
        """What a step does: room, then numbers, then the commit."""
        branch.reserve(len(ids))
        start = len(branch)
        for i, value in enumerate(history([*branch.ids, *ids])[start:], start):
            self.slots[self.slot(branch, i)] = value
        branch.commit(ids)

    def read(self, branch):
        return [self.slots[self.slot(branch, i)] for i in range(len(branch))]


# Long enough to fill blocks, and so few kinds that sequences often agree.
tokens = st.builds(lambda token, n: [token] * n, st.integers(0, 1), st.sampled_from([1, 7, 15, 16, 17, 40]))


class CacheMachine(RuleBasedStateMachine):
    """Any number of branches over a small pool; `truth` is what each of them holds."""

    def __init__(self):
        super().__init__()
        self.backend = FakeBackend(N_BLOCKS)
        self.pool = BlockPool(N_BLOCKS, self.backend.copy_block)
        self.branches: list[Branch] = []
        self.truth: list[list[int]] = []
        self.past: list[list[int]] = [[]]  # everything that any branch ever held

    def pick(self, data):
        return data.draw(st.integers(0, len(self.branches) - 1), label="branch")

    def held(self):
        return {block for b in self.branches for block in b.parts[0].table}

    @rule()
    def new(self):
        if len(self.branches) < 6:
            self.branches.append(new(self.pool))
            self.truth.append([])

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), ids=tokens)
    def append(self, data, ids):
        i = self.pick(data)
        b = self.branches[i]
        table = b.parts[0].table
        copied = len(b) % BLOCK and not self.pool.is_private(table[-1])
        shared = copied and self.pool.holders(table[-1]) > 1  # else the copy sets its original free
        blocks_needed = -(-(len(b) + len(ids)) // BLOCK) - len(table) + bool(shared)
        room = N_BLOCKS - len(self.held())
        enough = blocks_needed <= room and not (copied and not room)
        try:
            self.backend.write(b, ids)
        except PoolExhaustedError:
            # Only when the branches really hold everything (copy-on-write takes one block more).
            assert not enough
        else:
            assert enough
            self.truth[i] += ids
            self.past.append(list(self.truth[i]))

    @precondition(lambda self: self.branches)
    @rule(data=st.data())
    def truncate(self, data):
        i = self.pick(data)
        n = max(0, len(self.truth[i]) - data.draw(st.sampled_from([1, 3, 15, 16, 20, 60]), label="off"))
        self.branches[i].truncate(n)
        del self.truth[i][n:]

    @precondition(lambda self: 0 < len(self.branches) < 6)
    @rule(data=st.data())
    def fork(self, data):
        i = self.pick(data)
        before = self.backend.copies
        self.branches.append(self.branches[i].fork())
        self.truth.append(list(self.truth[i]))
        assert self.backend.copies == before

    @precondition(lambda self: self.branches)
    @rule(data=st.data())
    def free(self, data):
        i = self.pick(data)
        self.branches[i].free()
        self.truth[i] = []

    @precondition(lambda self: self.branches)
    @rule(data=st.data())
    def drop(self, data):
        i = self.pick(data)
        self.branches.pop(i).free()
        self.truth.pop(i)

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), tail=tokens)
    def match(self, data, tail):
        i = self.pick(data)
        ids = data.draw(st.sampled_from(self.past), label="like")
        ids = ids[: len(ids) - data.draw(st.sampled_from([0, 0, 1, 16, 30]), label="cut")] + tail
        own = common_prefix(self.truth[i], ids)
        live = max(common_prefix(t, ids) for t in self.truth)
        length = self.branches[i].match(ids)
        assert length == len(self.branches[i]) <= len(ids)
        assert length >= own
        # Whole blocks that a living branch holds are always found, whoever computed them.
        assert length >= live // BLOCK * BLOCK
        self.truth[i] = ids[:length]

    @invariant()
    def every_branch_reads_back_its_own_history(self):
        for b, ids in zip(self.branches, self.truth, strict=True):
            assert b.ids.tolist() == ids
            assert self.backend.read(b) == history(ids)

    @invariant()
    def at_most_15_slots_of_a_branch_are_wasted(self):
        for b in self.branches:
            assert 0 <= len(b.parts[0].table) * BLOCK - len(b) <= BLOCK - 1
            assert len(set(b.parts[0].table)) == len(b.parts[0].table)

    @invariant()
    def blocks_are_held_or_available(self):
        assert self.pool.available() == N_BLOCKS - len(self.held())
        assert self.pool.used >= len(self.held())

    def teardown(self):
        for b in self.branches:
            b.free()
        # Nothing leaked: a new branch can have the whole pool, and not a slot more.
        assert self.pool.available() == N_BLOCKS
        all_of_it = new(self.pool)
        self.backend.write(all_of_it, [2] * (N_BLOCKS * BLOCK))
        with pytest.raises(PoolExhaustedError):
            all_of_it.reserve(1)


CacheMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCache = CacheMachine.TestCase


@pytest.fixture
def backend():
    return FakeBackend(N_BLOCKS)


@pytest.fixture
def pool(backend):
    return BlockPool(N_BLOCKS, backend.copy_block)


def test_freed_blocks_are_found_again_by_content(backend, pool):
    ids = list(range(40))
    first = new(pool)
    backend.write(first, ids)
    first.free()
    assert pool.available() == N_BLOCKS
    second = new(pool)
    assert second.match(ids) == 32
    assert backend.read(second) == history(ids[:32])


def test_the_same_block_after_another_beginning_is_another_block(backend, pool):
    one, two = new(pool), new(pool)
    backend.write(one, [1] * BLOCK + [5] * BLOCK)
    backend.write(two, [2] * BLOCK)
    assert two.match([2] * BLOCK + [5] * BLOCK) == BLOCK


def test_branches_with_other_roots_never_share(backend, pool):
    one, two = Branch([Paged(pool)], b"act8"), Branch([Paged(pool)], b"act16")
    backend.write(one, [1] * BLOCK)
    assert two.match([1] * BLOCK) == 0


def test_the_end_of_a_forgotten_sequence_goes_before_its_beginning(backend, pool):
    old = new(pool)
    backend.write(old, list(range(4 * BLOCK)))
    old.free()
    other = new(pool)
    backend.write(other, [7] * ((N_BLOCKS - 2) * BLOCK))  # needs two of the four idle blocks
    other.free()
    assert new(pool).match(list(range(4 * BLOCK))) == 2 * BLOCK


def test_exhaustion_leaves_the_branch_readable(backend, pool):
    ids = list(range(100))
    branch = new(pool)
    backend.write(branch, ids)
    with pytest.raises(PoolExhaustedError):
        branch.reserve(N_BLOCKS * BLOCK)
    assert backend.read(branch) == history(ids)
    backend.write(branch, [5])
    assert len(branch) == 101


def test_a_fork_copies_one_block_when_it_writes(backend, pool):
    a = new(pool)
    backend.write(a, list(range(20)))
    b = a.fork()
    assert pool.used == 2
    backend.write(b, [90])
    backend.write(a, [91])
    assert backend.copies == 1
    assert pool.used == 3
    assert backend.read(a) == history([*range(20), 91])
    assert backend.read(b) == history([*range(20), 90])


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert common_prefix(np.arange(5).tolist(), np.arange(5).tolist()) == 5


def test_writing_after_a_rollback_leaves_findable_content_alone(backend, pool):
    first = list(range(20))
    branch = new(pool)
    backend.write(branch, first)
    branch.truncate(10)
    backend.write(branch, [50] * 10)
    assert backend.read(branch) == history(first[:10] + [50] * 10)
    other = new(pool)
    assert other.match(first) == 16
    assert backend.read(other) == history(first[:16])
    third = new(pool)
    assert third.match(first[:10] + [50] * 10) == 16
    assert backend.read(third) == history(first[:10] + [50] * 6)


@pytest.mark.parametrize("method", ["reserve", "own"])
def test_a_copy_that_fails_leaks_nothing(backend, pool, method):
    first = new(pool)
    backend.write(first, list(range(10)))
    second = first.fork()
    used, table = pool.used, list(second.parts[0].table)

    def lost(src, dst):
        raise RuntimeError("the GPU is lost")

    pool.copy_block = lost
    with pytest.raises(RuntimeError):
        second.reserve(1) if method == "reserve" else second.own(BLOCK)
    assert (pool.used, second.parts[0].table) == (used, table)
    pool.copy_block = backend.copy_block
    backend.write(second, [7])
    assert backend.read(second) == history([*range(10), 7])
    assert backend.read(first) == history(range(10))


def test_a_content_is_kept_once_and_stays_findable_with_its_last_holder(backend, pool):
    ids = list(range(16))
    first, second = new(pool), new(pool)
    backend.write(first, ids[:10])
    backend.write(second, ids)
    backend.write(first, ids[10:])
    assert first.parts[0].table == second.parts[0].table
    assert pool.used == 1
    first.truncate(0)
    backend.write(first, [7] * ((N_BLOCKS - 1) * BLOCK))  # takes every block that nobody holds
    second_again = new(pool)
    assert second_again.match(ids) == 16
    assert backend.read(second_again) == history(ids)
