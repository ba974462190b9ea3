"""Conversations with models that keep a state: a turn reads what is new, though no state can be cut back."""

from __future__ import annotations

import numpy as np
import pytest
from recurrent import delta_model, latent_model, mamba_model, recurrent_model, shared_model
from session_helpers import conversation_ids
from tiny import TEMPLATE

from tinychat.backends.interface import BLOCK
from tinychat.engine import kv_file
from tinychat.engine.memory.branch import common_prefix
from tinychat.session import Session

LONG = "x" * 4000
MEMORIES = {
    "convolution": recurrent_model,
    "delta rule": delta_model,
    "state space": mamba_model,
    "shared keys": shared_model,
    "latent rows": latent_model,
}
# As templates of reasoning models: what an answer begins with, and all up to its end, is gone one turn later.
STRIPPED = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "assistant\n{%", "assistant\n<think>\n{%"
)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))


def long_context(make, template):
    return make(ctx=4608, template=template, context_length=8192)


def read(done) -> int:
    """Tokens of the prompt that were computed."""
    return done.stats.prompt_tokens - done.stats.cached_tokens


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_a_turn_of_a_long_chat_reads_what_is_new(make):
    with long_context(make, TEMPLATE) as model:
        session = model.session(temperature=0, max_tokens=20, kv_policy="none")
        for turn, text in enumerate((LONG, "and then?", "and?")):
            *_, done = session.send(text)
            new = len(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
            assert read(done) <= (new if turn else 1 << 20)


@pytest.mark.parametrize("make", [recurrent_model, delta_model], ids=["convolution", "delta rule"])
def test_reasoning_that_is_stripped_costs_the_answer_and_two_blocks(make):
    with long_context(make, STRIPPED) as model:
        session = model.session(temperature=0, max_tokens=20, kv_policy="none")
        before: list[int] = []
        for turn in range(9):  # the prompt ends everywhere in a block
            *_, done = session.send(LONG if turn == 0 else "y" * (turn + 5))
            node = session.nodes[session.leaf]
            prompt = list(session._branch.ids)[: done.stats.prompt_tokens]
            if turn:
                assert read(done) < len(prompt) - common_prefix(before, prompt) + 2 * BLOCK
                assert read(done) < 200
            before = prompt
            node.content = "thoughts</think>" + node.content
            node.ids = None


def test_a_long_chat_with_stripped_reasoning_goes_on_from_its_file(tmp_path):
    with long_context(delta_model, STRIPPED) as model:
        session = model.session(temperature=0, max_tokens=20, kv_policy="none")
        list(session.send(LONG))
        session.save(tmp_path / "chat.json")
        *_, expected = session.send("and then?")
    with long_context(delta_model, STRIPPED) as model:
        back = Session.load(tmp_path / "chat.json", model)
        *_, done = back.send("and then?")
        assert done.completion.token_ids == expected.completion.token_ids
        assert conversation_ids(back) == conversation_ids(session)
        assert read(done) < 200


def test_another_answer_and_an_edit_go_on_from_the_nearest_state():
    with long_context(delta_model, TEMPLATE) as model:
        session = model.session(temperature=0, max_tokens=40, kv_policy="none")
        list(session.send(LONG))
        list(session.send("z" * 300))
        *_, again = session.regenerate()
        assert read(again) <= 2 * BLOCK
        *_, edited = session.edit(2, "another")
        assert read(edited) < 100


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("drafts", [False, True])
def test_a_branch_from_disk_goes_on_behind_the_middle_of_a_block_and_back_again(make, drafts, tmp_path):
    """The state at the last whole block is not on disk: no other may be taken for it."""
    said, more = [1 + i % 3 for i in range(65)], [2, 1]
    with make() as model:
        engine = model.engine
        branch = engine.branch()
        engine.run(branch, said, 65)
        assert kv_file.save(tmp_path / "1.safetensors", model, branch)
        branch.free()
        assert kv_file.load(tmp_path / "1.safetensors", model, branch) == 65
        if drafts:
            engine.run(branch, more, 0, accept=lambda out: 1)
            ids = [*said, more[0]]
        else:
            engine.run(branch, more, 0)
            ids = [*said, *more]
        with engine.changing():
            left = branch.truncate(64)
        again = [*ids[left:], 3]
        ours = engine.run(branch, again, 0)[-1]
    with make() as model:
        fresh = model.engine.branch()
        np.testing.assert_array_equal(ours, model.engine.run(fresh, [*ids, 3], 0)[-1])
