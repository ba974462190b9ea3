"""`/continue`: an answer that was stopped, cut or lost with its engine goes on where it was."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

pytestmark = pytest.mark.asyncio


async def test_a_stopped_answer_goes_on_and_is_one_message(store):
    app = make_app(store, Script("one two three", hang=True), Script(" four five", reason="length"), " six.")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "count")
        await wait_until(pilot, lambda: "three" in screen_text(app))
        await pilot.press("escape")
        await answered(pilot)
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: "cut: length limit" in screen_text(app))
        assert "one two three four five" in screen_text(app)
        app.chat.transcript.turns[-1].focus()
        await pilot.press("g")
        await wait_until(pilot, lambda: "five six." in screen_text(app) and not app.chat.answering)
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: "by itself" in screen_text(app))
    assert [m.content for m in store.messages(1)] == ["count", "one two three four five six."]
    answer = store.messages(1)[1]
    assert (answer.finish_reason, answer.ids) == ("stop", [0, 1, 2, 0, 1, 0])
    assert [[m.role for m in r.path] for r in app.engine.requests[1:]] == [["user", "assistant"]] * 2
    assert app.engine.requests[1].path[1].ids == [0, 1, 2]


async def test_without_an_answer_it_says_so(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: "There is no answer to go on with." in screen_text(app))


async def test_an_engine_that_dies_meanwhile_leaves_all_that_was_said_in_words(store):
    app = make_app(
        store,
        Script("half", reason="length"),
        Script(" of it", hang=True),
        Script(" is here.", reason="stop"),
    )
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await answered(pilot)
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: "half of it" in screen_text(app))
        app.engine.die()
        await wait_until(pilot, lambda: app.engine.starts == 2 and app.chat.ready)
        assert store.messages(1)[1].content == "half of it"
        assert store.messages(1)[1].ids == []  # those of the first half would be taken for the whole
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: "half of it is here." in screen_text(app) and not app.chat.answering)


async def test_one_that_is_stopped_before_it_said_more_is_as_it_was(store):
    app = make_app(store, Script("half", reason="length"), Script("", waits=True, reason="cancelled"))
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await answered(pilot)
        await say(pilot, "/continue")
        await wait_until(pilot, lambda: app.chat.answering)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not app.chat.answering)
    assert (store.messages(1)[1].content, store.messages(1)[1].ids) == ("half", [0])


async def test_one_that_ran_in_a_circle_is_answered_again_with_a_penalty(store):
    app = make_app(store, Script("again again again", reason="repeating"), "Better.", "third")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await wait_until(pilot, lambda: "stopped: repeating (p: retry)" in screen_text(app))
        app.chat.transcript.turns[-1].focus()
        await pilot.press("p")
        await wait_until(pilot, lambda: "Better." in screen_text(app) and not app.chat.answering)
        await say(pilot, "and")
        await wait_until(pilot, lambda: "third" in screen_text(app))
    params = [r.params.get("repeat_penalty") for r in app.engine.requests]
    assert params == [None, 1.15, None]
