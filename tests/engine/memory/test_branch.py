"""Branches that hold several memories, against a plain model of what each of them must read back."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinychat.backends.interface import BLOCK, STRETCH, MemorySpec, Slots, Tails, tail_of, with_tails
from tinychat.engine.eviction import EvictionPolicy, Ledger
from tinychat.engine.memory.ahead import ahead
from tinychat.engine.memory.branch import Branch, common_prefix
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError
from tinychat.engine.memory.sizes import blocks_at_first, blocks_of_one, new_parts

ROWS = 48  # of a step
CTX = 256
PAGED = MemorySpec("paged", (0,), 1, 1)
WINDOW = MemorySpec("window", (1,), 1, 1, window=40)
NARROW = MemorySpec("window", (2,), 1, 1, window=5)
STATE = MemorySpec("state", (3,), state_bytes=8)
KINDS = {
    "window": (PAGED, WINDOW),
    "two windows": (WINDOW, PAGED, NARROW),
    "windows only": (WINDOW,),
    "state": (PAGED, STATE),
    "state only": (STATE,),
    "all": (PAGED, STATE, WINDOW),
    "4 bits": with_tails((PAGED,)),
    "all in 4 bits": with_tails((PAGED, STATE, NARROW, WINDOW)),
}


def history(ids):
    """For each token a value that depends on it and on all before it, as keys, values and states do."""
    out, so_far = [], b""
    for token in ids:
        so_far = hashlib.blake2b(so_far + bytes([token]), digest_size=8).digest()
        out.append(so_far)
    return out


class FakeMemories:
    """Stands in for the numbers: a slot holds the history of the token that was written to it."""

    def __init__(self, specs, spacing=64, ctx=CTX):
        self.specs, self.spacing = specs, spacing
        sizes = [blocks_at_first(spec, ctx, ROWS) for spec in specs]
        self.slots = [
            [None] * (n * (1 if s.kind == "state" else BLOCK)) for s, n in zip(specs, sizes, strict=True)
        ]
        self.pools = [BlockPool(n, self.copier(i)) for i, n in enumerate(sizes)]

    def copier(self, memory):
        def copy(src, dst):
            slots = self.slots[memory]
            slots[dst * BLOCK : (dst + 1) * BLOCK] = slots[src * BLOCK : (src + 1) * BLOCK]

        return copy

    def branch(self, ledger=None):
        return Branch(new_parts(self.specs, self.pools, self.spacing), ledger=ledger)

    def step(self, branch, ids, accepted=None):
        """What the engine and a backend do. accepted: how many of `ids` stay (all; None: no drafts)."""
        branch.reserve(len(ids), each=accepted is not None)
        before, told = len(branch), history([*branch.ids, *ids])
        for memory, (spec, has) in enumerate(zip(self.specs, branch.spans(), strict=True)):
            slots = self.slots[memory]
            if spec.kind == "state":
                assert len(has.kept) == len(ids)
                state = None if has.source < 0 else slots[has.source]
                assert state == (told[before - 1] if before else None)
                for row, slot in enumerate(has.kept):
                    if slot >= 0:
                        slots[slot] = told[before + row]
                continue
            if spec.kind == "tail":
                self.write_exactly(slots, has.blocks, before, told, self.specs[spec.of].kind == "paged")
                continue
            assert has.length == before
            start, end = before, before + len(ids)
            assert len(has.table) * BLOCK >= end
            if tail_of(self.specs, memory) is not None:  # a block when its last slot is written
                start, end = (n // BLOCK * BLOCK for n in (start, end))
            for i in range(start, end):
                slots[has.table[i // BLOCK] * BLOCK + i % BLOCK] = told[i]
        branch.commit(ids[: len(ids) if accepted is None else accepted])

    def write_exactly(self, slots, blocks, before, told, reads_first):
        assert len(blocks) == -(-len(told) // BLOCK)
        self.read_exactly(slots, blocks, before, told, reads_first)
        for start in range(0, len(blocks), STRETCH // BLOCK):
            there = blocks[start : start + STRETCH // BLOCK] >= 0
            assert (
                there.all()
                or (start * BLOCK >= before // STRETCH * STRETCH and not there.any())
                or (start * BLOCK < before // STRETCH * STRETCH)
            )
        for i in range(before, len(told)):
            if (block := blocks[i // BLOCK]) >= 0:
                slots[block * BLOCK + i % BLOCK] = told[i]

    def read_exactly(self, slots, blocks, n, told, reads_first):
        """What the row behind n others sees exactly beside itself."""
        first = range(BLOCK if reads_first and n >= STRETCH else 0)
        for i in (*first, *range(n // STRETCH * STRETCH, n)):
            assert blocks[i // BLOCK] >= 0
            assert slots[blocks[i // BLOCK] * BLOCK + i % BLOCK] == told[i]

    def check(self, branch):
        """Whatever the next token reads is what belongs there."""
        told, n = history(branch.ids), len(branch)
        for memory, (spec, has) in enumerate(zip(self.specs, branch.spans(), strict=True)):
            slots = self.slots[memory]
            if spec.kind == "state":
                assert (slots[has.source] == told[-1]) if n else has.source == -1
                continue
            if spec.kind == "tail":
                blocks = branch.parts[memory].exact(-(-n // BLOCK))
                self.read_exactly(slots, blocks, n, told, self.specs[spec.of].kind == "paged")
                continue
            end = n if tail_of(self.specs, memory) is None else n // BLOCK * BLOCK
            seen = range(max(0, n - spec.window + 1) if spec.kind == "window" else 0, end)
            held = set(branch.parts[memory].held())
            for i in seen:
                assert has.table[i // BLOCK] in held
                assert slots[has.table[i // BLOCK] * BLOCK + i % BLOCK] == told[i]

    def held(self, memory, branches):
        return {block for b in branches for block in b.parts[memory].held()}


lengths = st.sampled_from([1, 2, 7, 15, 16, 17, 40])
tokens = st.builds(lambda token, n: [token] * n, st.integers(0, 1), lengths)


class MemoryMachine(RuleBasedStateMachine):
    """Any number of branches over small pools; `truth` is what each of them holds."""

    @initialize(kind=st.sampled_from(sorted(KINDS)))
    def open(self, kind):
        self.memories = FakeMemories(KINDS[kind])
        self.branches, self.truth, self.past = [], [], [[]]

    def pick(self, data):
        return data.draw(st.integers(0, len(self.branches) - 1), label="branch")

    @precondition(lambda self: len(self.branches) < 5)
    @rule()
    def new(self):
        self.branches.append(self.memories.branch())
        self.truth.append([])

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), ids=tokens)
    def append(self, data, ids):
        self.say(self.pick(data), ids, None)

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), ids=tokens)
    def verify(self, data, ids):
        ids = ids[:16]
        self.say(self.pick(data), ids, data.draw(st.integers(1, len(ids)), label="accepted"))

    def say(self, i, ids, accepted):
        if len(self.truth[i]) + len(ids) > CTX:
            return
        others = [b for j, b in enumerate(self.branches) if j != i]
        try:
            self.memories.step(self.branches[i], ids, accepted)
        except PoolExhaustedError as e:
            short = e.pool
        else:
            self.truth[i] += ids[:accepted]
            self.past.append(list(self.truth[i]))
            return
        # Only where what the others hold leaves less than one branch needs.
        memory = self.memories.pools.index(short)
        needed = blocks_of_one(self.memories.specs[memory], CTX, ROWS)
        assert short.n_blocks - len(self.memories.held(memory, others)) < needed

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), n=st.integers(1, 16))
    def look_ahead(self, data, n):
        """A layer that predicts further writes behind a branch: nothing that is there changes."""
        kinds, branch = [spec.kind for spec in self.memories.specs], self.branches[self.pick(data)]
        if "state" not in kinds or len(branch) + n > CTX:
            return
        with suppress(PoolExhaustedError), ahead(branch, kinds.index("state"), n) as rows:
            for at in range(len(branch), len(branch) + n):
                span = rows.span(0)
                assert span.position == at
                for slots, has in zip(self.memories.slots, span.memories, strict=True):
                    if isinstance(has, Slots):
                        slots[has.table[at // BLOCK] * BLOCK + at % BLOCK] = "ahead"
                    elif isinstance(has, Tails):
                        slots[has.blocks[at // BLOCK] * BLOCK + at % BLOCK] = "ahead"
                    elif has.kept[0] >= 0:
                        slots[has.kept[0]] = "ahead"

    @precondition(lambda self: self.branches)
    @rule(data=st.data())
    def keep(self, data):
        self.branches[self.pick(data)].keep()

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), off=st.sampled_from([1, 3, 15, 16, 20, 60]))
    def truncate(self, data, off):
        i = self.pick(data)
        n = max(0, len(self.truth[i]) - off)
        left = self.branches[i].truncate(n)
        assert left == len(self.branches[i]) <= max(n, 0)
        del self.truth[i][left:]

    @precondition(lambda self: 0 < len(self.branches) < 5)
    @rule(data=st.data())
    def fork(self, data):
        i = self.pick(data)
        self.branches.append(self.branches[i].fork())
        self.truth.append(list(self.truth[i]))

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), drop=st.booleans())
    def free(self, data, drop):
        i = self.pick(data)
        self.branches[i].free()
        self.truth[i] = []
        if drop:
            del self.branches[i], self.truth[i]

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), tail=tokens)
    def match(self, data, tail):
        i = self.pick(data)
        ids = data.draw(st.sampled_from(self.past), label="like")
        ids = ids[: len(ids) - data.draw(st.sampled_from([0, 0, 1, 16, 30]), label="cut")] + tail
        whole = common_prefix(self.truth[i], ids) == len(self.truth[i])
        length = self.branches[i].match(ids)
        assert length == len(self.branches[i]) <= len(ids)
        assert not whole or length >= len(self.truth[i])  # what only goes on loses nothing
        self.truth[i] = ids[:length]

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), wrong=st.booleans())
    def repair(self, data, wrong):
        """An exception came in the middle of a change of one branch."""
        i = self.pick(data)
        if wrong:
            self.branches[i]._whole = False
            self.truth[i] = []
        for b in self.branches:
            b.repair()
        for memory, pool in enumerate(self.memories.pools):
            pool.rebuild([b.parts[memory].held() for b in self.branches])

    @invariant()
    def every_branch_reads_back_its_own_history(self):
        for b, ids in zip(getattr(self, "branches", []), getattr(self, "truth", []), strict=True):
            assert b.ids.tolist() == ids
            self.memories.check(b)

    @invariant()
    def windows_and_states_hold_no_more_however_long_the_branch(self):
        for b in getattr(self, "branches", []):
            for spec, part in zip(self.memories.specs, b.parts, strict=True):
                if spec.kind == "window":
                    assert len(part.held()) <= -(-spec.window // BLOCK) + 1 + spec.stretch // BLOCK
                elif spec.kind == "state":
                    assert len(part.held()) <= 3
                elif spec.kind == "tail":
                    assert len(part.held()) <= 1 + 2 * STRETCH // BLOCK

    @invariant()
    def blocks_are_held_or_available(self):
        for memory, pool in enumerate(self.memories.pools if hasattr(self, "memories") else []):
            assert pool.available() == pool.n_blocks - len(self.memories.held(memory, self.branches))

    def teardown(self):
        if not hasattr(self, "memories"):
            return
        for b in self.branches:
            b.free()
        for pool in self.memories.pools:
            assert pool.available() == pool.n_blocks
            for _ in range(pool.n_blocks):  # snapshots make way for what is needed
                pool.allocate()
            with pytest.raises(PoolExhaustedError):
                pool.allocate()


MemoryMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestMemories = MemoryMachine.TestCase


def read(memories, branch, ids, keep=True):
    """A prompt in chunks."""
    while len(branch) < len(ids):
        memories.step(branch, ids[len(branch) : len(branch) + ROWS])
    if keep:
        branch.keep()


def answer(memories, branch, ids):
    """Drafts of eight tokens, of which seven are right."""
    for i in range(0, len(ids), 7):
        memories.step(branch, [*ids[i : i + 7], 255], accepted=len(ids[i : i + 7]))


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 200, n).tolist()


def kept_before(kind, n):
    """Tokens of a prompt of n that can be gone on from: a state is kept a stretch before the last whole one,
    and a window in 4 bits may not reach back from there.
    """
    kinds, stretch = [spec.kind for spec in KINDS[kind]], KINDS[kind][0].stretch
    blocks = ("state" in kinds) + ("state" in kinds and "window" in kinds and "tail" in kinds)
    return ((n - 1) // stretch - blocks) * stretch


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("n", [95, 96, 97, 110])
def test_behind_a_long_answer_the_prompt_is_still_there(kind, n):
    memories = FakeMemories(KINDS[kind], ctx=2048)
    prompt, branch = random_ids(n), memories.branch()
    read(memories, branch, prompt)
    answer(memories, branch, random_ids(900, 1))
    assert branch.match(prompt[:-1]) >= kept_before(kind, n)
    memories.check(branch)
    other = memories.branch()
    assert other.match(prompt[:-1]) >= kept_before(kind, n)
    memories.check(other)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_earlier_turn_is_gone_back_to_where_its_snapshot_is(kind):
    memories = FakeMemories(KINDS[kind], ctx=2048)
    branch, said, turns = memories.branch(), [], []
    for turn in range(3):
        said = said + random_ids(90, turn)
        assert branch.match(said[:-1]) >= len(said) - 90
        read(memories, branch, said)
        turns.append(list(said))
        said = said + random_ids(30, 9 + turn)
        answer(memories, branch, said[-30:])
    for asked in reversed(turns):
        n = branch.match([*asked[:-1], 201])
        assert n >= kept_before(kind, len(asked))
        memories.check(branch)


@pytest.mark.parametrize("kind", ["window", "state", "all"])
def test_a_long_text_with_another_question_is_read_from_the_last_snapshot_before_it(kind):
    memories = FakeMemories(KINDS[kind], spacing=128, ctx=2048)
    text = random_ids(1000)
    first = memories.branch()
    read(memories, first, text + [1] * 70)
    first.free()
    second = memories.branch()
    assert second.match(text + [2] * 70) >= 1000 // 128 * 128
    memories.check(second)


def test_the_oldest_snapshot_makes_way_first():
    memories = FakeMemories((STATE,), ctx=CTX)
    pool, seen = memories.pools[0], []
    for i in range(pool.n_blocks + 3):
        branch = memories.branch()
        seen.append([i] * 20)
        read(memories, branch, seen[-1])
        branch.free()
    found = [memories.branch().match(ids) for ids in seen]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == 16


def test_going_back_behind_what_is_left_begins_again():
    memories = FakeMemories(KINDS["all"], spacing=4096, ctx=4096)
    branch = memories.branch()
    ids = random_ids(1600)
    read(memories, branch, ids, keep=False)
    pool = memories.pools[2]
    assert len(branch.parts[2].held()) < pool.n_blocks < len(ids) // BLOCK
    assert branch.truncate(300) == 0
    assert branch.match(ids) == 0
    read(memories, branch, ids)
    memories.check(branch)


@pytest.mark.parametrize("kind", ["window", "all", "windows only"])
def test_after_an_eviction_windows_go_on_and_are_not_shared(kind):
    memories = FakeMemories(KINDS[kind], ctx=256)
    policy = EvictionPolicy.of("window", 128)
    ledger = Ledger(policy, *((0, 1) if kind == "windows only" else (1, 1)))
    branch, ids = memories.branch(ledger), random_ids(128)
    memories.step(branch, ids[:48]), ledger.append(48)
    memories.step(branch, ids[48:96]), ledger.append(48)
    memories.step(branch, ids[96:]), ledger.append(32)
    branch.own(BLOCK)
    branch.give_up(16)
    branch.drop_empty_blocks()
    window = branch.parts[-1]
    assert (len(branch), branch.slots, window.end) == (128, 112, 8)
    branch.reserve(5)
    assert [s.length for s in branch.spans() if hasattr(s, "length")] == (
        [128] if kind == "windows only" else [112, 128]
    )
    branch.commit([1] * 5), ledger.append(5)
    assert memories.branch().match([*ids, *[1] * 5]) <= 128
    before = ledger.next_position
    branch.own_all()
    turns = branch.reindex()
    assert turns[-1] == 117 - before == -16
    held = window.held()
    assert all(memories.pools[-1].is_private(block) for block in held)
    fork = branch.fork()
    assert fork.parts[-1].held() == held


def test_an_abandoned_window_is_reclaimed():
    memories = FakeMemories((WINDOW,))
    branch = memories.branch()
    read(memories, branch, random_ids(100), keep=False)
    pool = memories.pools[0]
    assert pool.available() < pool.n_blocks
    pool.abandon(branch.parts[0].held())
    assert pool.available() == pool.n_blocks


def test_tables_of_forks_do_not_write_into_each_other():
    memories = FakeMemories(KINDS["all"])
    one = memories.branch()
    read(memories, one, random_ids(70))
    two = one.fork()
    memories.step(one, [1, 2, 3])
    memories.step(two, [4, 5, 6], accepted=2)
    memories.check(one)
    memories.check(two)
    assert one.ids[-3:].tolist() == [1, 2, 3]
    assert two.ids[-2:].tolist() == [4, 5]
