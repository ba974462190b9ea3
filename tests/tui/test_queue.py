"""What is sent while an answer is running waits for its end, is seen, and can be taken back."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

pytestmark = pytest.mark.asyncio


async def test_messages_wait_and_are_said_one_after_the_other(store):
    app = make_app(store, Script("one", waits=True), "two", "three")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "first")
        await say(pilot, "second")
        await say(pilot, "third")
        await wait_until(pilot, lambda: "next: second" in screen_text(app))
        assert "next: third  ↑ takes it back" in screen_text(app)
        await pilot.press(*"being typed")
        app.engine.cancelled.set()  # go on
        await answered(pilot, 3)
        assert "next:" not in screen_text(app)
        assert app.chat.composer.text == "being typed"
    said = [m.content for m in store.messages(1)]
    assert said == ["first", "one", "second", "two", "third", "three"]


async def test_the_newest_is_taken_back_by_up_and_sent_anew(store):
    app = make_app(store, Script("one", waits=True), "two", "three")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "first")
        await say(pilot, "second")
        await say(pilot, "thrid")
        await pilot.press("up")
        assert app.chat.composer.text == "thrid"
        await pilot.press(*["backspace"] * 3, *"ird", "enter")
        app.engine.cancelled.set()
        await answered(pilot, 3)
    assert [m.content for m in store.messages(1)][2::2] == ["second", "third"]


async def test_after_a_stop_or_a_failure_nothing_is_said_and_nothing_is_lost(store):
    app = make_app(store, Script("one", hang=True), Script("two", hang=True))
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "first")
        await say(pilot, "second")
        await say(pilot, "third")
        await pilot.press(*"fourth")
        await pilot.press("escape")
        await answered(pilot)
        assert app.chat.composer.text == "second\n\nthird\n\nfourth"
        assert len(store.messages(1)) == 2
        await pilot.press("enter")
        await say(pilot, "fifth")
        await wait_until(pilot, lambda: "two" in screen_text(app))
        app.engine.die()
        await wait_until(pilot, lambda: app.chat.composer.text == "fifth")


async def test_a_bell_rings_at_the_end_of_a_long_answer_that_nobody_watches(store, monkeypatch):
    app = make_app(store, "one", Script("two", waits=True), Script("three", waits=True))
    rung, titles = [], []
    monkeypatch.setattr(app, "bell", lambda: rung.append(None))
    monkeypatch.setattr(app, "name_window", titles.append)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "short")
        await answered(pilot)
        assert not rung
        monkeypatch.setattr("tinychat.tui.screens.answering.LONG", 0.0)
        await say(pilot, "long")
        await wait_until(pilot, lambda: titles[-1] == "● short · tinychat")
        app.app_focus = False  # a key gave it back
        app.engine.cancelled.set()
        await answered(pilot, 2)
        assert titles[-1] == "short · tinychat"
        assert len(rung) == 1
        await say(pilot, "watched")
        app.engine.cancelled.set()
        await answered(pilot, 3)
    assert len(rung) == 1
