"""Models and sessions for programs with an event loop: the same answers, and a task's end is its answer's."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import weakref

import pytest
from session_helpers import END, GREEDY
from tiny import tiny_model

import tinychat
from tinychat.base.errors import UsageError
from tinychat.base.events import Done
from tinychat.chat_request import ChatRequest

pytestmark = pytest.mark.asyncio
ENDLESS = dict(temperature=0, logit_bias={END: -100}, max_tokens=3000)


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=4096) as m:
        yield m


def answering():
    """The threads that make answers."""
    return [t for t in threading.enumerate() if t.name == "answer" and t.is_alive()]


def ids(events):
    return [e.token_id for e in events if getattr(e, "token_id", None) is not None]


async def test_a_conversation_of_coroutines_is_the_same(model):
    here, there = model.session("Be kind.", **GREEDY), model.session("Be kind.", **GREEDY)
    for said, awaited, arguments, sampling in (
        (here.send, there.asend, ["hi"], {}),
        (here.regenerate, there.aregenerate, [], dict(temperature=1, seed=3)),
        (here.edit, there.aedit, [0, "hello"], {}),
        (here.go_on, there.ago_on, [], dict(max_tokens=4)),
        (here.send, there.asend, ["bye"], dict(max_tokens=3)),
    ):
        a = list(said(*arguments, **sampling))
        b = [e async for e in awaited(*arguments, **sampling)]
        assert [e.text for e in a] == [e.text for e in b]
        assert ids(a) == ids(b)
        assert isinstance(b[-1], Done)
    assert here.messages == there.messages
    assert [m.parent for m in here.nodes] == [m.parent for m in there.nodes]


async def test_answers_of_a_model_are_the_same_whole_and_in_pieces(model):
    whole = model.chat("hi", **GREEDY)
    awaited = await model.achat("hi", **GREEDY)
    assert dataclasses.replace(awaited, stats=whole.stats) == whole
    events = [e async for e in model.achat([{"role": "user", "content": "hi"}], stream=True, **GREEDY)]
    assert ids(events) == whole.token_ids
    assert isinstance(events[-1], Done)
    prompt = [e async for e in model.agenerate("Once upon", **GREEDY)]
    assert ids(prompt) == ids(model.generate("Once upon", **GREEDY))


async def test_answers_made_at_once_are_those_made_alone(model):
    questions = ["one", "two", "three", "four"]
    alone = [model.chat(q, **GREEDY).token_ids for q in questions]
    together = await asyncio.gather(*(model.achat(q, **GREEDY) for q in questions))
    assert [a.token_ids for a in together] == alone


async def test_cancelling_the_task_stops_the_answer_and_keeps_what_was_said(model):
    session, read = model.session(**GREEDY), []

    async def reading():
        async for event in session.asend("hi", **ENDLESS):
            read.append(event)
            if len(read) == 5:
                task.cancel()

    task = asyncio.ensure_future(reading())
    with pytest.raises(asyncio.CancelledError):
        await task
    # At once: no step of it runs any more, and the conversation is free.
    last = session.nodes[session.leaf]
    assert last.finish_reason == "cancelled"
    assert last.ids[:5] == ids(read)
    assert len(last.ids) < 100
    assert (await anext(session.ago_on(max_tokens=2))).token_id is not None


async def test_cancelling_the_task_stops_an_answer_that_is_awaited_whole(model, monkeypatch):
    made, ask = [], ChatRequest.events

    def recorded(self, *args):
        for event in ask(self, *args):
            made.append(event)
            yield event

    monkeypatch.setattr(ChatRequest, "events", recorded)
    task = asyncio.ensure_future(model.achat("hi", **ENDLESS))
    while len(made) < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made[-1].finish_reason == "cancelled"
    assert made[-1].stats.generated_tokens < 1000
    assert not answering()


async def test_after_a_break_the_next_message_waits_for_the_answer_to_stop(model):
    session = model.session(**GREEDY)
    for i in range(4):
        async for _ in session.asend(f"question {i}", **ENDLESS):
            break
        if i == 2:  # the twin without a loop does too
            next(session.send("and?", **ENDLESS))
    answers = [m for m in session.nodes if m.role == "assistant"]
    assert len(answers) == 5
    done = [e async for e in session.asend("last", max_tokens=2)][-1]
    assert done.completion.finish_reason == "length"
    assert all(m.finish_reason == "cancelled" and len(m.ids) < 200 for m in answers)


async def test_another_task_may_cancel_and_the_reader_hears_the_end(model):
    session, events = model.session(**GREEDY), []
    async for event in session.asend("hi", **ENDLESS):
        events.append(event)
        if len(events) == 3:
            asyncio.get_running_loop().call_soon(session.cancel)
    assert events[-1].finish_reason == "cancelled"
    assert ids(events) == session.nodes[session.leaf].ids


async def test_a_second_question_is_refused_while_the_first_is_answered(model):
    session = model.session(**GREEDY)
    async with session.asend("hi", **ENDLESS) as first:
        await anext(first)
        with pytest.raises(UsageError, match="still answering"):
            await anext(session.asend("me too"))
        await anext(first)
    assert len(session.nodes) == 2


async def test_what_is_wrong_is_raised_where_it_is_awaited(model):
    session = model.session(**GREEDY)
    with pytest.raises(UsageError, match="empty"):
        await anext(session.asend(""))
    with pytest.raises(UsageError, match="temperature"):
        await model.achat("hi", temperature=-1)
    with pytest.raises(UsageError, match="no messages"):
        await anext(model.achat([], stream=True))
    with pytest.raises(UsageError, match="stream"):
        model.achat("hi", stream="yes")
    assert session.nodes == []
    assert not answering()


async def test_a_conversation_that_is_forgotten_gives_its_memory_back_at_once(model):
    session = model.session(**GREEDY)
    [_ async for _ in session.asend("hi")]
    async for _ in session.asend("and?"):
        break
    [_ async for _ in session.asend("last", max_tokens=2)]
    gone = weakref.ref(session)
    gc.collect()
    gc.disable()
    try:
        del session
        assert gone() is None
    finally:
        gc.enable()


async def test_a_model_that_is_closed_meanwhile_ends_the_answer_with_an_error():
    model = tiny_model(ctx=4096)

    async def read():
        async for _ in model.session(**GREEDY).asend("hi", **ENDLESS):
            model.close()

    with pytest.raises(tinychat.TinychatError):
        await read()
    assert not answering()
