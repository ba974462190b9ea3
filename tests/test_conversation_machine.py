"""Everything that may happen to conversations at once, against the same conversations held alone.

Branches of one crowded engine are appended to, forked, rolled back, thinned out, freed, saved and loaded,
drafts are verified on them, prefixes found;
each must go on exactly like a twin that lives in an engine with room for all, shares nothing and is computed
from its own beginning. Bit for bit, so a block that is shared, copied, moved or read wrongly is seen.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from heads import head_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from recurrent import further_model, looked_ahead, mamba_model, recurrent_model
from tiny import tiny_model

from tinychat.engine import kv_file
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.network.config import RopeConfig

BUDGET = 112
MOST = 4
tokens = st.builds(lambda token, n: [token] * n, st.integers(1, 3), st.sampled_from([1, 2, 15, 16, 17, 40]))
policies = st.sampled_from([None, EvictionPolicy.of("h2o", BUDGET), EvictionPolicy.of("window", BUDGET)])


class Twins:
    """A branch in the crowd, and what was appended to it since it was empty."""

    def __init__(self, branch, policy, parts=()):
        self.branch, self.policy, self.parts = branch, policy, list(parts)


class ConversationMachine(RuleBasedStateMachine):
    @staticmethod
    def model(**options):
        return tiny_model(backend="cpu", **options)

    @initialize()
    def open(self):
        self.crowd = self.model(ctx=MOST * 112, grows=False)
        self.alone = self.model(ctx=512)
        for m in (self.crowd, self.alone):
            m.engine.trained_context = 256  # positions run out now and then
        self.folder = Path(tempfile.mkdtemp())
        self.saved: dict[Path, Twins] = {}
        self.all: list[Twins] = []

    def pick(self, data):
        return self.all[data.draw(st.integers(0, len(self.all) - 1), label="branch")]

    def twin(self, t: Twins):
        """The same conversation, read anew."""
        branch = self.alone.engine.branch(t.policy)
        for part in t.parts:
            self.alone.engine.run(branch, part, len(part))
        return branch

    @precondition(lambda self: len(self.all) < MOST)
    @rule(policy=policies)
    def new(self, policy):
        self.all.append(Twins(self.crowd.engine.branch(policy), policy))

    @precondition(lambda self: self.all)
    @rule(data=st.data(), ids=tokens)
    def append(self, data, ids):
        self.say(self.pick(data), ids)

    @precondition(lambda self: self.all)
    @rule(data=st.data(), token=st.integers(1, 3), n=st.integers(48, 120))
    def append_much(self, data, token, n):
        self.say(self.pick(data), [token + i % 2 for i in range(n)])

    def say(self, t, ids):
        held = self.read_again(t)
        if t.policy is None and held + len(ids) > 200:
            return
        alone = self.twin(t)
        for i in range(0, len(ids), 32):
            if part := ids[i : i + 32]:
                ours, theirs = (
                    e.run(b, part, 0) for e, b in ((self.crowd.engine, t.branch), (self.alone.engine, alone))
                )
                t.parts.append(part)
                np.testing.assert_array_equal(ours, theirs)
        alone.free()

    def read_again(self, t):
        """Others may have needed its blocks; then it reads itself again, as a session does. Its length."""
        held = sum(len(part) for part in t.parts)
        if len(t.branch) < held:
            t.branch.free()
            for part in t.parts:
                self.crowd.engine.run(t.branch, part, len(part))
        return held

    @precondition(lambda self: any(t.policy is None for t in self.all))
    @rule(data=st.data(), ids=st.lists(st.integers(1, 3), min_size=2, max_size=16))
    def verify(self, data, ids):
        """Drafts, of which some are right."""
        t = self.pick_without_policy(data)
        if self.read_again(t) + len(ids) > 200:
            return
        right = data.draw(st.integers(1, len(ids)), label="right")
        ours = self.crowd.engine.run(t.branch, ids, 0, accept=lambda out: right)
        alone = self.twin(t)
        theirs = self.alone.engine.run(alone, ids[:right], 0)
        alone.free()
        np.testing.assert_array_equal(ours[:right], theirs)
        t.parts.append(ids[:right])

    def pick_without_policy(self, data):
        free = [t for t in self.all if t.policy is None]
        return free[data.draw(st.integers(0, len(free) - 1), label="branch")]

    @precondition(lambda self: any(t.policy is None for t in self.all))
    @rule(data=st.data(), token=st.integers(1, 3), asked=st.booleans())
    def go_back(self, data, token, asked):
        """To a prefix of what one of them holds, whoever computed it, and on from there."""
        t, like = self.pick_without_policy(data), self.pick(data)
        said = [i for part in like.parts for i in part]
        said = said[: data.draw(st.integers(0, min(len(said), 180)), label="prefix")]
        if asked:
            t.branch.keep()
        with self.crowd.engine.changing():
            n = t.branch.match(said)
        assert n <= len(said)
        t.parts = [said[:n]] if n else []
        self.say(t, [*said[n:], token])

    @precondition(lambda self: 0 < len(self.all) < MOST)
    @rule(data=st.data())
    def fork(self, data):
        t = self.pick(data)
        self.all.append(Twins(t.branch.fork(), t.policy, t.parts))

    @precondition(lambda self: any(t.parts for t in self.all))
    @rule(data=st.data())
    def roll_back(self, data):
        t = self.pick(data)
        if t.branch.ledger and t.branch.ledger.watches:  # votes cannot be taken back: a session reads again
            return
        held = sum(len(part) for part in t.parts)
        if (
            not t.parts
            or t.branch.evicted
            or len(t.branch) < held
            or held - len(t.parts[-1]) < t.branch._floor
        ):
            return
        n = held - len(t.parts.pop())
        with self.crowd.engine.changing():
            left = t.branch.truncate(n)  # or further back, where windows and states end
        if said := [i for part in t.parts for i in part][left:n]:
            self.crowd.engine.run(t.branch, said, len(said))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def drop(self, data):
        t = self.pick(data)
        self.all.remove(t)
        t.branch.free()

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def save(self, data):
        t = self.pick(data)
        path = self.folder / f"{len(self.saved)}.safetensors"
        if len(t.branch) == sum(len(p) for p in t.parts) and kv_file.save(path, self.crowd, t.branch):
            self.saved[path] = Twins(None, t.policy, t.parts)

    @precondition(lambda self: self.saved and len(self.all) < MOST)
    @rule(data=st.data())
    def load(self, data):
        path = data.draw(st.sampled_from(sorted(self.saved)), label="file")
        was = self.saved[path]
        branch = self.crowd.engine.branch(was.policy)
        if n := kv_file.load(path, self.crowd, branch):
            assert n == sum(len(p) for p in was.parts)
            self.all.append(Twins(branch, was.policy, was.parts))

    def teardown(self):
        if not hasattr(self, "crowd"):
            return
        for t in self.all:
            t.branch.free()
        for pool in self.crowd.engine.memories.pools:
            assert pool.available() == pool.n_blocks  # nothing leaked
        self.crowd.close()
        self.alone.close()
        shutil.rmtree(self.folder)


class ConversationMachine8(ConversationMachine):
    @staticmethod
    def model(**options):
        return tiny_model(backend="cpu", kv_bits=8, **options)


class WindowMachine(ConversationMachine):
    """Two layers of three forget what is behind their window."""

    @staticmethod
    def model(**options):
        windows = dict(n_layers=3, window=24, windowed_layers=(0, 2))
        return tiny_model(backend="cpu", local_rope=RopeConfig(dim=16, theta=500.0), **windows, **options)


class RecurrentMachine(ConversationMachine):
    """Full attention, a window and a convolution."""

    model = staticmethod(recurrent_model)


class StateSpaceMachine(ConversationMachine):
    """Full attention and state spaces."""

    model = staticmethod(mamba_model)


class DeltaMachine(ConversationMachine):
    """Full attention, in 4 bits, delta rules, and a layer that predicts further."""

    @staticmethod
    def model(**options):
        return further_model(kv_bits=4, **options)

    @precondition(lambda self: self.all)
    @rule(data=st.data(), ids=st.lists(st.integers(1, 3), min_size=1, max_size=8))
    def look_ahead(self, data, ids):
        t = self.pick(data)
        if self.read_again(t) == 0 or len(t.branch) + len(ids) > 200:
            return
        alone = self.twin(t)
        with suppress(PoolExhaustedError):
            ours = looked_ahead(self.crowd, t.branch, ids)
            np.testing.assert_array_equal(ours, looked_ahead(self.alone, alone, ids))
        alone.free()


class HeadMachine(DeltaMachine):
    """Full attention and a head that looks into it."""

    @staticmethod
    def model(**options):
        with tempfile.TemporaryDirectory() as folder:
            return head_model(Path(folder) / "head", **options)


ConversationMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
ConversationMachine8.TestCase.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)
WindowMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
StateSpaceMachine.TestCase.settings = RecurrentMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=30, deadline=None
)
DeltaMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=30, deadline=None)
HeadMachine.TestCase.settings = settings(max_examples=5, stateful_step_count=30, deadline=None)
TestConversations = ConversationMachine.TestCase
TestConversations8 = ConversationMachine8.TestCase
TestWindows = WindowMachine.TestCase
TestStateSpace = StateSpaceMachine.TestCase
TestRecurrent = RecurrentMachine.TestCase
TestDelta = DeltaMachine.TestCase
TestHead = HeadMachine.TestCase


@pytest.mark.slow
def test_ten_thousand_operations():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        ConversationMachine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None)
    )


@pytest.mark.parametrize("wrong", ["one off", "swapped", "not copied"])
def test_a_wrong_block_table_is_seen(monkeypatch, wrong):
    """What the machine relies on: no mistake in a copied table leaves the bits as they are."""
    ids = np.random.default_rng(0).integers(0, 256, 72).tolist()
    with tiny_model(ctx=256, backend="cpu") as crowd, tiny_model(ctx=256, backend="cpu") as alone:
        crowd.engine.run(crowd.engine.branch(), [9] * 40, 40)  # somebody else's blocks
        first = crowd.engine.branch()
        crowd.engine.run(first, ids[:40], 40)
        other = first.fork()
        if wrong == "one off":
            other.parts[0].table[1] += 1
        elif wrong == "swapped":
            table = other.parts[0].table
            table[0], table[1] = table[1], table[0]
        else:
            monkeypatch.setattr(crowd.engine.memories.pools[0], "copy_block", lambda src, dst: None)
        twin = alone.engine.branch()
        alone.engine.run(twin, ids[:40], 40)
        ours, theirs = crowd.engine.run(other, ids[40:], 0), alone.engine.run(twin, ids[40:], 0)
        assert not np.array_equal(ours, theirs)
        first.parts[0].table.clear(), other.parts[0].table.clear()  # the counts are wrong now on purpose
