from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.conversation import Message
from tinychat.tui.screens.chat import ChatScreen

pytestmark = pytest.mark.asyncio


async def test_an_answer_streams_as_markdown_and_is_stored(store):
    app = make_app(store, "# Title\n\nSome **bold** words.\n\n```python\nx = 1\n```\n")
    async with app.run_test(size=(90, 30)) as pilot:
        await pilot.press(*"hello", "enter")
        await answered(pilot)
        text = screen_text(app)
        assert "▌ hello" in text
        assert "Some bold words." in text
        assert "**" not in text
        assert "x = 1" in text
        assert "20.0 tok/s · first token 250 ms" in text
        messages = store.messages(app.chat.conversation.chat.id)
    assert [m.role for m in messages] == ["user", "assistant"]
    assert messages[1].content.startswith("# Title")
    assert messages[1].finish_reason == "stop"
    assert messages[1].ids
    assert messages[1].prompt_ids == [1, 2]


async def test_escape_stops_and_keeps_what_was_said(store):
    app = make_app(store, Script("one two three", hang=True))
    async with app.run_test() as pilot:
        await say(pilot, "count")
        await wait_until(pilot, lambda: "three" in screen_text(app))
        assert app.chat.answering
        await pilot.press("escape")
        await answered(pilot)
        assert "one two three" in screen_text(app)
        assert "stopped" in screen_text(app)
    assert store.messages(1)[1].finish_reason == "cancelled"
    assert store.messages(1)[1].content == "one two three"


async def test_typing_works_while_the_model_loads_and_the_question_waits(store):
    app = make_app(store, "Late.", loads=False)
    async with app.run_test() as pilot:
        await say(pilot, "early")
        await wait_until(pilot, lambda: "waiting for the model" in screen_text(app))
        app.engine.loads = True
        app.engine.load("demo", {})
        await answered(pilot)
        assert "Late." in screen_text(app)


async def test_the_next_question_carries_the_ids_of_the_last_answer(store):
    app = make_app(store, "a b c", "d")
    async with app.run_test() as pilot:
        await say(pilot, "one")
        await answered(pilot)
        await say(pilot, "two")
        await answered(pilot, 2)
    path = app.engine.requests[1].path
    assert [m.role for m in path] == ["user", "assistant", "user"]
    assert path[1].ids == [0, 1, 2]
    assert path[1].prompt_ids == [1, 2]


async def test_a_dead_engine_is_replaced_and_the_chat_goes_on(store):
    app = make_app(store, Script("half an answer", hang=True), "Whole.")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await wait_until(pilot, lambda: "half an answer" in screen_text(app))
        app.engine.die("it was killed (signal 9)")
        await wait_until(pilot, lambda: app.engine.starts == 2 and app.chat.ready)
        text = screen_text(app)
        assert "it was killed (signal 9)" in text
        assert "half an answer" in text
        assert "the engine failed" in text
        await say(pilot, "again")
        await answered(pilot, 2)
        assert "Whole." in screen_text(app)
    # What was cut is said again in words: its ids are not certain.
    cut = Message("assistant", "half an answer", 0, finish_reason="error")
    assert app.engine.requests[1].path[1] == cut


async def test_an_engine_that_keeps_dying_is_left_alone(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        for n in range(2, 5):
            app.engine.die()
            await wait_until(pilot, lambda n=n: app.engine.starts == n)
        app.engine.die()
        await wait_until(pilot, lambda: "no model" in screen_text(app))
        assert app.engine.starts == 4


async def test_escapes_and_markup_are_shown_not_obeyed(store):
    hostile = "[bold red]x[/] \x1b[31mred\x1b]52;c;aGk=\x07 [@click=app.quit]here[/] \x9b2J \u202eevil"
    app = make_app(store, hostile)
    async with app.run_test(size=(110, 30)) as pilot:
        await say(pilot, hostile)
        await answered(pilot)
        text = screen_text(app)
        assert "[bold red]x[/]" in text
        assert "[@click=app.quit]here[/]" in text
        assert "␛[31mred" in text
        for control in "\x1b\x9b\x07\u202e":
            assert control not in text


@pytest.mark.parametrize("where", ["hear", "_paint_if_new"])
async def test_a_bug_of_ours_is_not_swallowed(store, monkeypatch, where):
    app = make_app(store, Script("one two three four", 4))

    def broken(*args):
        raise ValueError("a bug")

    async def talk():
        async with app.run_test() as pilot:
            await say(pilot, "count")
            await wait_until(pilot, lambda: app._exception is not None)

    monkeypatch.setattr(ChatScreen, where, broken)
    with pytest.raises(ValueError, match="a bug"):
        await talk()


async def test_the_status_line_counts_the_context_while_it_is_filled(store):
    app = make_app(store, Script("one two three four", 4, hang=True))
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "count")
        await wait_until(pilot, lambda: " 14/4096" in screen_text(app))
        assert app.chat.answering


async def test_what_comes_behind_the_key_that_leaves_ends_nothing(store):
    """Nothing can be mounted any more, which is no error then."""
    app = make_app(store)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        app._exit = True  # as between that key and the end
        tried = []

        async def toggle():
            tried.append("ctrl+b")
            await app.chat.action_toggle_sidebar()

        app.call_next(toggle)
        await wait_until(pilot, lambda: tried)
        await pilot.pause()
        app.exit()
    assert app._exception is None
    assert app.return_code == 0
