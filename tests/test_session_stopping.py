"""Answers that are cancelled, closed, or meet an error."""

from __future__ import annotations

import threading

import pytest
from session_helpers import GREEDY, TOKENIZER, alone, conversation_ids, opening, say, spell, turn
from tiny import tiny_model

from tinychat.base.errors import CheckpointError, UsageError
from tinychat.base.events import Done


@pytest.fixture
def model():
    with tiny_model(ctx=256) as m:
        yield m


def test_cancel_from_another_thread_while_decoding_keeps_what_was_said(model):
    session = model.session(temperature=0)
    model.tokenizer.eos_ids = frozenset()
    events = []
    for event in session.send("hello"):
        events.append(event)
        if len(events) == 5:
            thread = threading.Thread(target=session.cancel)
            thread.start()
            thread.join()
    done = events[-1]
    assert done.finish_reason == "cancelled"
    assert 5 <= done.stats.generated_tokens <= 6
    assert session.messages[-1]["content"] == "".join(e.text for e in events) == done.completion.text
    assert session.nodes[session.leaf].ids == done.completion.token_ids
    # The cancel was for that answer only.
    assert say(session, "go on", max_tokens=3).finish_reason == "length"


def test_cancel_while_prefilling_leaves_an_empty_answer(model):
    session = model.session(temperature=0)
    model.backend.max_rows = 16
    inner, steps = model.backend.step, []

    def step(s):
        steps.append(len(s.spans[0].token_ids))
        if len(steps) == 3:
            session.cancel()
        return inner(s)

    model.backend.step = step
    *reading, done = session.send("x" * 200)
    assert [e.tokens for e in reading] == [16, 32, 48]
    assert (done.finish_reason, done.completion.text) == ("cancelled", "")
    assert len(steps) == 3  # between two chunks, not after the last
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    model.backend.step = inner
    again = list(session.regenerate(max_tokens=2))[-1]
    assert again.stats.cached_tokens >= 32
    assert again.finish_reason == "length"


def test_a_cancel_before_the_first_event_counts(model):
    session = model.session(temperature=0)
    stream = session.send("hello")
    session.cancel()
    assert [type(e) for e in stream] == [Done]
    assert session.nodes[session.leaf].finish_reason == "cancelled"


def test_closing_the_iterator_early_keeps_the_partial_answer(model):
    session = model.session(temperature=0)
    stream = session.send("hello")
    said = [next(stream) for _ in range(4)]
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": "".join(e.text for e in said)}
    assert session.nodes[session.leaf].finish_reason == "cancelled"
    done = say(session, "more", max_tokens=5)
    ids = conversation_ids(session)
    ids = ids[: len(ids) - len(turn("assistant", done.completion.token_ids))]
    assert done.completion.token_ids == alone(model, ids + opening(), max_tokens=5)


def test_a_closed_iterator_keeps_no_token_whose_text_was_not_shown(model):
    session = model.session(temperature=0)
    smile = spell("a😀")
    inner = model.backend.step

    def step(s):
        out = inner(s)
        if len(out):
            (span,) = s.spans
            at = span.position + len(span.token_ids) - len(turn("user", spell("hello")) + opening())
            out[-1], out[-1, smile[min(at, 4)]] = -1.0, 1.0
        return out

    model.backend.step = step
    stream = session.send("hello")
    assert [next(stream).text for _ in range(3)] == ["a", "", ""]
    stream.close()
    node = session.nodes[session.leaf]
    assert (node.content, node.ids) == ("a", spell("a"))


def test_an_error_in_the_middle_keeps_what_was_said(model):
    session = model.session(temperature=0)
    inner, steps = model.backend.step, []

    def step(s):
        steps.append(s)
        if len(steps) == 4:
            raise RuntimeError("device lost")
        return inner(s)

    model.backend.step = step
    said = []
    stream = (said.append(e.text) for e in session.send("hello"))
    with pytest.raises(RuntimeError, match="device lost"):
        list(stream)
    node = session.nodes[session.leaf]
    assert len(said) == 3
    assert (node.content, node.finish_reason) == ("".join(said), "error")
    assert TOKENIZER.decode(node.ids) == node.content
    model.backend.step = inner
    assert say(session, "again", max_tokens=2).finish_reason in ("length", "stop")


def test_a_refusing_template_changes_nothing():
    refuses = (
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
    )
    with tiny_model(template=refuses) as m:
        session = m.session(**GREEDY)
        list(session.send("one"))
        with pytest.raises(UsageError, match="one only"):
            list(session.send("two"))
        assert len(session.messages) == 2
    with tiny_model(template="{{ messages[0].nope.nope }}") as m:
        session = m.session()
        with pytest.raises(CheckpointError):
            list(session.send("one"))
        assert session.messages == []


def test_one_answer_at_a_time(model):
    session = model.session(temperature=0)
    stream = session.send("hello")
    next(stream)
    for call in (lambda: session.send("x"), session.regenerate, lambda: session.edit(0, "x")):
        with pytest.raises(UsageError, match="still answering"):
            list(call())
    late = model.session(temperature=0)
    first, second = late.send("a"), late.send("b")  # both asked for before either began
    next(first)
    with pytest.raises(UsageError, match="still answering"):
        next(second)
    first.close()
    stream.close()
    say(session, "now", max_tokens=1)


def test_an_answer_that_runs_in_a_circle_ends_where_it_is_asked_to(model, monkeypatch):
    model.tokenizer.eos_ids = frozenset()
    circle = spell("ab")

    def step(s):
        out = inner(s)
        if len(out):
            at = s.spans[0].position + len(s.spans[0].token_ids)
            out[-1], out[-1, circle[at % 2]] = -1.0, 1.0
        return out

    inner = model.backend.step
    monkeypatch.setattr(model.backend, "step", step)
    monkeypatch.setattr("tinychat.text.repeating.WINDOW", 40)
    session = model.session(temperature=0, draft="none")
    assert say(session, "hello", max_tokens=90).finish_reason == "length"
    session.ends_circles = True
    done = list(session.regenerate(max_tokens=90))[-1]
    assert (done.finish_reason, done.completion.finish_reason) == ("repeating", "repeating")
    assert session.nodes[session.leaf].finish_reason == "repeating"
    assert len(done.completion.token_ids) == 40
    assert done.completion.text == session.messages[-1]["content"]
    # It may be wanted: going on counts from the start.
    assert list(session.go_on(max_tokens=30))[-1].finish_reason == "length"
    assert list(session.go_on(max_tokens=90))[-1].finish_reason == "repeating"
