"""Random walks over the tree of a conversation."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from recurrent import further_model, latent_model, mamba_model, recurrent_model, shared_model
from session_helpers import conversation_ids, opening, turn
from tiny import tiny_model

from tinychat.base.errors import UsageError


class SessionMachine(RuleBasedStateMachine):
    """Random walks over the tree of a conversation; the last answer is always what its exact ids lead to."""

    make = staticmethod(tiny_model)

    def __init__(self):
        super().__init__()
        self.model = self.make(ctx=256, grows=False)
        self.alone = self.make(ctx=256)  # shares nothing with the conversation
        self.alone.draft = "none"
        self.session = self.model.session(kv_policy="none", temperature=0, max_tokens=5)
        self.finished = []

    def check(self, stream, cut=None):
        s = self.session
        before = s.leaf, len(s.nodes)
        try:
            for n, _ in enumerate(stream):
                if n == cut:
                    break
        except UsageError:  # longer than the context
            assert (s.leaf, len(s.nodes)) == before
            assert s.count_tokens() > 150
            return
        finally:
            stream.close()
        node = s.nodes[s.leaf]
        ids = conversation_ids(s)
        prompt = ids[: len(ids) - len(turn("assistant", node.ids))] + opening()
        *_, done = self.alone.generate(prompt, temperature=0, max_tokens=5)
        assert done.completion.token_ids[: len(node.ids)] == node.ids
        if cut is None:
            assert len(done.completion.token_ids) == len(node.ids)
        self.finished.append((s.leaf, node.content, list(node.ids)))

    @rule(text=st.sampled_from(["a", "hello there", "x" * 40]), cut=st.sampled_from([None, None, 0, 2]))
    def send(self, text, cut):
        self.check(self.session.send(text), cut)

    @precondition(lambda self: self.session.nodes)
    @rule()
    def regenerate(self):
        self.check(self.session.regenerate())

    @precondition(lambda self: self.session.nodes)
    @rule(data=st.data())
    def edit(self, data):
        users = [i for i, n in enumerate(self.session.nodes) if n.role == "user"]
        self.check(self.session.edit(data.draw(st.sampled_from(users)), "edited"))

    @precondition(lambda self: self.session.nodes)
    @rule(data=st.data())
    def switch(self, data):
        self.session.switch(data.draw(st.sampled_from(range(len(self.session.nodes)))))

    @rule()
    def somebody_else_wants_the_pool(self):
        list(self.model.generate([7] * 240, temperature=0, max_tokens=1))

    @invariant()
    def what_was_said_stays(self):
        for i, content, ids in self.finished:
            assert (self.session.nodes[i].content, self.session.nodes[i].ids) == (content, ids)
        roles = [m["role"] for m in self.session.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)

    def teardown(self):
        self.model.close()
        self.alone.close()


class RecurrentSessionMachine(SessionMachine):
    """Layers with full attention, with a window and with a convolution."""

    make = staticmethod(recurrent_model)


class DeltaSessionMachine(SessionMachine):
    """Layers with full attention and with a delta rule, and one behind them that drafts."""

    make = staticmethod(further_model)


class StateSpaceSessionMachine(SessionMachine):
    """Layers with full attention and with a state space."""

    make = staticmethod(mamba_model)


class SharedSessionMachine(SessionMachine):
    """Layers with a window and without, and others that attend to keys and values of these."""

    make = staticmethod(shared_model)


class LatentSessionMachine(SessionMachine):
    """Layers of which a token's cached row is its key and its value."""

    make = staticmethod(latent_model)


SessionMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
for machine in (
    RecurrentSessionMachine,
    DeltaSessionMachine,
    StateSpaceSessionMachine,
    SharedSessionMachine,
    LatentSessionMachine,
):
    machine.TestCase.settings = settings(
        max_examples=8, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestSession = SessionMachine.TestCase
TestStateSpaceSession = StateSpaceSessionMachine.TestCase
TestRecurrentSession = RecurrentSessionMachine.TestCase
TestDeltaSession = DeltaSessionMachine.TestCase
TestSharedSession = SharedSessionMachine.TestCase
TestLatentSession = LatentSessionMachine.TestCase
