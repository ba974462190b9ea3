"""Regenerating, editing and switching; several conversations on one model."""

from __future__ import annotations

import threading

import pytest
from session_helpers import GREEDY, alone, conversation_ids, opening, say, spell, turn
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Done, TextDelta


@pytest.fixture
def model():
    with tiny_model(ctx=256, grows=False) as m:
        yield m


# Branches


def test_regenerate_is_a_sibling_and_shares_the_prompt(model):
    session = model.session(temperature=1.0, seed=5, max_tokens=10)
    first = say(session, "hello")
    *_, second = session.regenerate()
    assert second.completion.token_ids != first.completion.token_ids
    assert second.stats.cached_tokens == second.stats.prompt_tokens - 1
    user, a, b = range(3)
    assert session.siblings(a) == session.siblings(b) == [a, b]
    assert session.path() == [user, b]
    session.switch(a)
    assert session.messages[-1]["content"] == first.completion.text
    assert session.path() == [user, a]
    # Going on from the first answer is as though the second had never been.
    follow = say(session, "and?", temperature=0)
    ids = turn("user", spell("hello")) + turn("assistant", first.completion.token_ids)
    assert follow.completion.token_ids == alone(
        model, ids + turn("user", spell("and?")) + opening(), max_tokens=10
    )
    session.switch(b)
    assert session.path() == [user, b]
    session.switch(user)
    assert session.path() == [user, b]


def test_edit_branches_from_the_message(model):
    session = model.session(**GREEDY)
    say(session, "one")
    say(session, "two")
    *_, done = session.edit(2, "three")
    assert [m["content"] for m in session.messages][::2] == ["one", "three"]
    assert session.siblings(2) == [2, 4]
    first = session.nodes[1].ids
    prompt = turn("user", spell("one")) + turn("assistant", first) + turn("user", spell("three")) + opening()
    assert done.completion.token_ids == alone(model, prompt)
    assert done.stats.cached_tokens > 0
    *_, root = session.edit(0, "zero")
    assert [m["content"] for m in session.messages][::2] == ["zero"]
    assert root.completion.token_ids == alone(model, turn("user", spell("zero")) + opening())


@pytest.mark.parametrize("node", [-1, 1, 7])
def test_only_ones_own_messages_can_be_edited(model, node):
    session = model.session(**GREEDY)
    say(session, "one")
    with pytest.raises(UsageError, match="message"):
        session.edit(node, "two")


@pytest.mark.parametrize("node", [-1, 7])
def test_switching_to_a_message_that_is_not_there(model, node):
    session = model.session(**GREEDY)
    say(session, "one")
    with pytest.raises(UsageError, match="message"):
        session.switch(node)


def test_nothing_to_regenerate(model):
    with pytest.raises(UsageError, match="regenerate"):
        list(model.session().regenerate())


# Several conversations


def test_two_sessions_share_the_pool_and_their_beginning(model):
    a, b = (model.session(system="The same long system prompt for both.", **GREEDY) for _ in range(2))
    say(a, "one")
    assert say(b, "two").stats.cached_tokens >= 32
    for session in (a, b, a, b):
        done = say(session, "more", max_tokens=4)
        ids = conversation_ids(session)
        ids = ids[: len(ids) - len(turn("assistant", done.completion.token_ids))]
        assert done.completion.token_ids == alone(model, ids + opening(), max_tokens=4)


def test_interleaved_answers_do_not_disturb_each_other(model):
    a, b = model.session(**GREEDY), model.session(**GREEDY)
    one, two = a.send("one " * 8), b.send("two " * 8)
    for x, y in zip(one, two, strict=False):
        assert isinstance(x, (TextDelta, Done))
        assert isinstance(y, (TextDelta, Done))
    list(one), list(two)
    for session, text in ((a, "one " * 8), (b, "two " * 8)):
        assert session.nodes[1].ids == alone(model, turn("user", spell(text)) + opening())


def test_an_idle_session_gives_its_room_and_computes_it_again(model):
    idle, greedy = model.session(**GREEDY), model.session(**GREEDY)
    first = say(idle, "remember this " * 8)
    say(greedy, "x" * 220)  # nearly the whole pool
    done = say(idle, "what was it?")
    ids = turn("user", spell("remember this " * 8)) + turn("assistant", first.completion.token_ids)
    assert done.completion.token_ids == alone(model, ids + turn("user", spell("what was it?")) + opening())


def test_sessions_in_threads(model):
    results = {}

    def work(i):
        session = model.session(**GREEDY)
        results[i] = [say(session, f"thread {i} says {n}").completion.token_ids for n in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for i in range(3):
        history = []
        for n, ids in enumerate(results[i]):
            history += turn("user", spell(f"thread {i} says {n}"))
            assert ids == alone(model, history + opening())
            history += turn("assistant", ids)


def test_a_session_nobody_holds_leaves_nothing_behind(model):
    for i in range(20):
        say(model.session(**GREEDY), f"{i} " * 60)
    say(model.session(**GREEDY), "y" * 220)


def test_a_question_goes_behind_what_was_said_last_when_its_answer_begins(model):
    session = model.session(**GREEDY)
    first, second = session.send("one"), session.send("two")
    list(first), list(second)
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["one", "two"]
