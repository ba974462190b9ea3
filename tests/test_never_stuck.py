"""Whatever happens to conversations, each of them can always go on."""

from __future__ import annotations

import gc
import random
import sys
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import tiny_model

from tinychat.base.events import Done
from tinychat.conversation import Message
from tinychat.process.core import Core
from tinychat.process.protocol import Answer, Failed, Finished, Load

pytest.importorskip("torch", reason="needs torch: the sessions are on the reference backend")

MOST = 3
texts = st.sampled_from(["hi", "and then?", "x" * 50])


class CrowdMachine(RuleBasedStateMachine):
    """Several chats in a small context whose memory is full, with answers that end in every way."""

    @initialize(ctx=st.sampled_from([112, 160, 256]), policy=st.sampled_from([None, None, "window"]))
    def open(self, ctx, policy):
        # The system prompt that a chat may have is short, so that the smallest context holds it.
        self.model = tiny_model(ctx=ctx, backend="cpu", grows=False)
        self.policy = policy
        self.sessions = [self.new()]
        self.parked = []

    def new(self):
        return self.model.session(kv_policy=self.policy, seed=1, max_tokens=150)

    def pick(self, data):
        return self.sessions[data.draw(st.integers(0, len(self.sessions) - 1), label="session")]

    def goes_on(self, events, n, how):
        """Stop an answer after n tokens in one of many ways."""
        *_, session = how
        for i, _ in enumerate(events):
            if i == n:
                if how[0] == "cancel":
                    session.cancel()
                elif how[0] == "close":
                    events.close()
                else:
                    break

    @rule(
        data=st.data(),
        text=texts,
        n=st.sampled_from([0, 1, 5, 30, 100, 1000]),
        how=st.sampled_from(["cancel", "close", "drop"]),
    )
    def say(self, data, text, n, how):
        session = self.pick(data)
        self.goes_on(session.send(text), n, (how, session))

    @rule(data=st.data(), n=st.sampled_from([0, 5, 1000]), how=st.sampled_from(["cancel", "close"]))
    def again(self, data, n, how):
        session = self.pick(data)
        if session.nodes:
            self.goes_on(session.regenerate(), n, (how, session))

    @rule(data=st.data(), n=st.sampled_from([0, 5, 1000]))
    def edit(self, data, n):
        session = self.pick(data)
        users = [i for i, node in enumerate(session.nodes) if node.role == "user"]
        if users:
            node = data.draw(st.sampled_from(users), label="node")
            self.goes_on(session.edit(node, "edited"), n, ("cancel", session))

    @rule(data=st.data())
    def cancelled_before_it_begins(self, data):
        session = self.pick(data)
        events = session.send("hi")
        session.cancel()
        assert [type(e) for e in events][-1] is Done

    @rule(data=st.data())
    def never_begun(self, data):
        self.parked.append(self.pick(data).send("never asked for"))

    @rule(data=st.data(), n=st.sampled_from([1, 40]))
    def never_ended(self, data, n):
        """An answer that nobody goes on with; the next one in this chat ends it."""
        session = self.pick(data)
        events = session.send("hi")
        for _ in range(n):
            next(events, None)
        session.cancel()
        self.parked.append(events)

    @precondition(lambda self: len(self.sessions) < MOST)
    @rule()
    def another(self):
        self.sessions.append(self.new())

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(data=st.data())
    def gone(self, data):
        session = self.pick(data)
        self.sessions.remove(session)
        held = [session]
        del session
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()

    @rule(text=texts)
    def somebody_else(self, text):
        self.model.chat([{"role": "user", "content": text}], max_tokens=30)

    @invariant()
    def every_chat_can_go_on(self):
        for session in getattr(self, "sessions", ()):
            *_, done = session.send("go on", max_tokens=2)
            assert done.finish_reason in ("stop", "length")

    def teardown(self):
        pool = self.model.engine.memories.pools[0]
        self.sessions.clear(), self.parked.clear()
        gc.collect()
        assert pool.available() == pool.n_blocks  # nothing leaked
        self.model.close()


CrowdMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCrowd = CrowdMachine.TestCase


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr("tinychat.engine.engine.PATIENCE_SECONDS", 0.0)


def test_the_screens_engine_goes_on_after_any_number_of_escs():
    path, told = [], []
    rng = random.Random(3)
    with tiny_model(ctx=256, backend="cpu", grows=False) as model:
        core = Core(told.append, lambda *_: model)
        core._load(Load("tiny", {"keep_kv": False}))
        for turn in range(30):
            path += [Message("user", "hi")]
            stop, chat, count = rng.choice([1, 5, 40, 10**9]), str(turn % 2), [0]

            def tell(said, stop=stop, core=core, count=count):
                told.append(said)
                count[0] += 1
                if count[0] >= stop and core.answering:
                    core.cancelled.set()

            core.cancelled.clear()
            core.tell = tell
            core._answer(Answer(chat, path, None, {"seed": turn, "max_tokens": 120}))
            path = list(core.sessions[chat].nodes)
    assert not [said for said in told if isinstance(said, Failed)]
    assert sum(isinstance(said, Finished) for said in told) == 30


INTERRUPTED = (
    *("engine.py", "scheduler.py", "step.py", "eviction.py", "generation.py", "session.py"),
    *("memories.py", "branch.py", "paged.py", "pool.py", "window.py", "state.py"),
)


def interrupted(n, action):
    """Run it, with Ctrl+C (or no memory) at the n-th line of the files above; how many lines there were."""
    count, error = 0, KeyboardInterrupt if n % 3 else MemoryError

    def trace(frame, event, _):
        nonlocal count
        path = frame.f_code.co_filename
        if "tinychat/" not in path or not path.endswith(INTERRUPTED):
            return None
        count += event == "line"
        if count == n:
            sys.settrace(None)
            raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except error:
        pass
    finally:
        sys.settrace(before)
    return count


def interrupt(model, policy, n):
    first, second = (model.session(kv_policy=policy, temperature=0, max_tokens=20) for _ in range(2))
    for _ in range(1 if policy == "none" else 4):
        list(first.send("hello there"))
    list(second.send("x" * 60))

    def act(session=first):
        list(session.send("hello there"))
        list(session.regenerate())

    lines = interrupted(n, act)
    for events in (first.send("again"), second.send("y"), first.regenerate()):
        assert isinstance(list(events)[-1], Done)
    del first, second, events, act
    gc.collect()
    assert not [b for b in model.engine._branches if b.holds_blocks]
    with model.engine.changing():
        assert all(pool.available() == pool.n_blocks for pool in model.engine.memories.pools)
    return lines


def interrupt_at(policy, points):
    with tiny_model(ctx=208, backend="cpu", grows=False) as model:
        lines = interrupt(model, policy, 10**9)
        assert lines > 2000
        for n in random.Random(points).sample(range(1, lines), points):
            interrupt(model, policy, n)


# What an exception interrupts may be a generator's end; Python says so where nobody can hear it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("policy", ["none", "h2o"])
def test_an_exception_at_any_line_leaves_nothing_stuck_and_nothing_leaked(policy):
    interrupt_at(policy, 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("policy", ["none", "h2o", "window"])
def test_an_exception_at_many_lines(policy):
    interrupt_at(policy, 300)
