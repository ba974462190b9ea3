"""A message larger than the context: said before it is sent, and shown while it is read."""

from __future__ import annotations

import pytest
from engine_helpers import FAKE, Heard, ask
from scripted import Script, screen_text, wait_until
from tiny import tiny_model
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.base.events import Done, Notice, Reading, TextDelta
from tinychat.base.events import Reading as Read
from tinychat.process.client import EngineClient
from tinychat.process.protocol import Loaded
from tinychat.tui.screens.too_large import TooLargeScreen
from tinychat.tui.widgets.turn import duration

LONG = "word " * 6000  # the scripted engine counts words; its context holds 4,096


async def too_large(app, pilot):
    await wait_until(pilot, lambda: isinstance(app.screen, TooLargeScreen) and "4,096" in screen_text(app))
    return screen_text(app)


def sent(app, n=0):
    return read_by_model(app.engine.requests[n])


@pytest.mark.asyncio
async def test_a_message_larger_than_the_context_is_asked_about_and_can_be_kept(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        app.chat.composer.paste(LONG)
        await wait_until(pilot, lambda: "more than the context holds: 4096 tokens" in screen_text(app))
        await say(pilot, "what is this?")
        assert "6,00" in await too_large(app, pilot)
        await pilot.press("escape")
        await wait_until(pilot, lambda: "what is this?" in screen_text(app))
        assert [a.name for a in app.chat.composer.attachments] == ["paste 1"]
        assert not app.engine.requests
    assert store.chats() == []


@pytest.mark.asyncio
async def test_the_first_tokens_of_it_are_sent_with_the_question_whole(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        app.chat.composer.paste(LONG)
        await say(pilot, "what is this?")
        assert "Send the first 3,072 tokens" in await too_large(app, pilot)
        await pilot.press("enter")
        await answered(pilot)
    assert sent(app).endswith("what is this?")
    assert "paste 1 (the first 3,069 of 6,000 tokens)" in sent(app)
    assert sent(app).count("word") == 3069


@pytest.mark.asyncio
async def test_all_of_it_can_be_sent_where_tokens_are_given_up_only(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        await say(pilot, LONG)
        assert "Send all of it" in await too_large(app, pilot)
        await pilot.press("down", "enter")
        await answered(pilot)
        app.options["kv_policy"] = "none"
        await say(pilot, LONG)
        assert "Send all of it" not in await too_large(app, pilot)
    assert sent(app).count("word") == 6000


@pytest.mark.asyncio
async def test_a_question_that_waited_for_the_model_is_weighed_when_that_is_there(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, LONG)
        await wait_until(pilot, lambda: "waiting for the model" in screen_text(app))
        app.engine.loads = True
        app.engine.load("demo", {})
        await too_large(app, pilot)
        await pilot.press("enter")
        await answered(pilot)
    assert sent(app).count("word") == 3072
    assert len(app.engine.requests) == 1


@pytest.mark.asyncio
async def test_how_much_of_the_prompt_is_read_and_how_long_it_takes_is_shown(store):
    app = make_app(store, Script("Fine.", waits=True))
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await wait_until(pilot, lambda: app.engine.requests)
        app.engine.on_event(Read(3072, 38_893, 59.0))
        expected = "reading the prompt: 3,072 of 38,893 tokens, 10 min "
        await wait_until(pilot, lambda: expected in screen_text(app))
        app.engine.cancelled.set()
        await answered(pilot)
        assert "reading the prompt" not in screen_text(app)


def test_durations():
    assert [duration(s) for s in (0.2, 59, 98.2, 7300)] == ["0 s", "59 s", "1 min 38 s", "2 h 1 min"]


def test_reading_a_long_prompt_is_told_chunk_by_chunk():
    with tiny_model(ctx=256) as model:
        session = model.session(temperature=0, max_tokens=3)
        events = list(session.send("a" * 150))
        read = [e for e in events if isinstance(e, Reading)]
        assert [e.tokens for e in read] == sorted({e.tokens for e in read})
        assert read
        assert all(0 < e.tokens < e.total == events[-1].stats.prompt_tokens and e.rate > 0 for e in read)
        assert isinstance(events[-1], Done)
        first = next(i for i, e in enumerate(events) if isinstance(e, TextDelta))
        assert not any(isinstance(e, Reading) for e in events[first:])
        assert not any(isinstance(e, Notice) for e in events)

        again = session.send("b" * 150)  # left in the middle: nothing was said
        while not isinstance(next(again), Reading):
            pass
        again.close()
        assert len(session.nodes) == 2
        assert list(session.send("short"))[-1].finish_reason == "length"


def test_a_prompt_beyond_the_context_is_said_before_it_is_read():
    with tiny_model(ctx=256) as model:
        events = list(model.session(temperature=0, max_tokens=3).send("a" * 400))
        kinds = [type(e).__name__ for e in events]
        notice = next(e for e in events if isinstance(e, Notice))
        assert "the context holds 256" in notice.message
        assert kinds.index("Notice") < kinds.index("Reading") < kinds.index("TextDelta")


@pytest.mark.asyncio
async def test_the_beginning_of_a_text_has_as_many_tokens_as_were_asked_for():
    heard = Heard()
    client = EngineClient(heard.append, FAKE)
    await client.start()
    assert await client.head("a b c", 2) is None  # nothing is loaded
    client.load("fake", {})
    await heard.wait(Loaded)
    text = "one two three\n" * 2000
    head = await client.head(text, 3000)
    assert text.startswith(head)
    assert 2900 <= len(head.split()) <= 3000
    assert await client.head("short", 3000) == "short"
    ask(client, "hello")
    await client.close()
