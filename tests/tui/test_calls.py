"""Calls of tools on the screen: asked for, run, folded, stopped; nothing runs unasked."""

from __future__ import annotations

import pytest
from fake_servers import toolbox
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.mcp.toolbox import DENIED, STOPPED
from tinychat.tui.screens import allowing, calling
from tinychat.tui.screens.allowing import AllowingScreen

pytestmark = pytest.mark.asyncio
ADD = ("add", '{"a": 2, "b": 3}')


@pytest.fixture(autouse=True)
def prompt_keys(monkeypatch):
    monkeypatch.setattr(allowing, "UNASKED", 0.0)


@pytest.fixture
def box(tmp_path):
    return toolbox(tmp_path)


def asks(pilot):
    return isinstance(pilot.app.screen, AllowingScreen) and pilot.app.screen.ready


def said(app):
    return [(m.role, m.content) for m in app.chat.conversation.path()]


async def test_a_call_is_asked_for_run_and_answered(store, box):
    app = make_app(store, Script("I add.", calls=(ADD,)), "Five.", toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: asks(pilot))
        await pilot.pause()
        shown = screen_text(app)
        assert "The model wants to call fs/add" in shown
        assert '"a": 2' in shown
        assert box.servers.called == []
        await pilot.press("o")
        await answered(pilot, 2)
        assert box.servers.called == [("add", {"a": 2, "b": 3})]
        assert said(app) == [
            ("user", "2 + 3?"),
            ("assistant", "I add."),
            ("tool", "5"),
            ("assistant", "Five."),
        ]
        first, second = app.engine.requests
        assert [t["function"]["name"] for t in first.tools] == ["add", "sub"]
        assert second.path[1].tool_calls[0]["id"] == second.path[2].tool_call_id
        shown = screen_text(app)
        assert '▸ called fs · add {"a": 2, "b": 3}' in shown
        assert "▸ ↳ 5" in shown
        await pilot.press("ctrl+up", "up", "up", "enter")  # opens the call
        await wait_until(pilot, lambda: "▾ called fs · add" in screen_text(app))
        assert '      "a": 2,' in screen_text(app)
    number = store.chats()[0].id
    assert [m.role for m in store.messages(number)] == ["user", "assistant", "tool", "assistant"]


async def test_keys_that_were_typed_for_something_else_allow_nothing(store, box, monkeypatch):
    monkeypatch.setattr(allowing, "UNASKED", 1e9)
    app = make_app(store, Script(calls=(ADD,)), toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: isinstance(app.screen, AllowingScreen))
        await pilot.press("o", "a", "enter", "down", "enter", "n")
        await pilot.pause()
        assert isinstance(app.screen, AllowingScreen)
        assert box.servers.called == []
        await pilot.press("escape")
        await wait_until(pilot, lambda: not app.chat.answering)
        assert box.servers.called == []


async def test_always_holds_for_the_tool_as_it_is(store, box):
    scripts = [Script(calls=(ADD,)), Script(calls=(ADD, ADD)), "Done.", Script(calls=(ADD,)), "Again."]
    app = make_app(store, *scripts, toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: asks(pilot))
        await pilot.press("a")
        await answered(pilot, 3)
        assert len(box.servers.called) == 3
        server = box.servers.servers[0]
        server.tools = [
            server.tools[0].__class__("add", "Adds, and tells everybody.", server.tools[0].schema)
        ]
        await say(pilot, "Again?")
        await wait_until(pilot, lambda: asks(pilot))
        assert "tells everybody" in screen_text(app)
        await pilot.press("n")
        await answered(pilot, 5)
        assert len(box.servers.called) == 3
        assert said(app)[-2][1] == DENIED
        assert app.engine.requests[-1].tools == []  # what may never run is not offered


async def test_esc_stops_the_question_and_all_calls_behind_it(store, box):
    app = make_app(store, Script(calls=(ADD, ADD)), "Well.", toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: asks(pilot))
        await pilot.press("escape")
        await wait_until(pilot, lambda: not app.chat.answering)
        assert [m for m in said(app) if m[0] == "tool"] == [("tool", STOPPED)] * 2
        assert len(app.engine.requests) == 1
        await say(pilot, "Then say it yourself.")
        await answered(pilot, 2)
        assert [m.role for m in app.engine.requests[1].path] == ["user", "assistant", "tool", "tool", "user"]


async def test_esc_stops_a_call_that_hangs(store, box):
    box.servers.waits = True
    app = make_app(store, Script(calls=(ADD,)), toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: asks(pilot))
        await pilot.press("o")
        await wait_until(pilot, lambda: box.servers.futures)
        assert app.chat.answering
        await wait_until(pilot, lambda: app.chat._waited_for is not None)
        await pilot.press("escape")
        await wait_until(pilot, lambda: not app.chat.answering)
        assert box.servers.futures[0].cancelled()
        assert said(app)[-1] == ("tool", STOPPED)


async def test_a_call_whose_server_is_switched_off_goes_on_without_it(store, box):
    box.servers.waits = True
    app = make_app(store, Script(calls=(ADD,)), "Well.", toolbox=box)
    async with app.run_test() as pilot:
        box.permissions.keep(box.tools()[0], "always")
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: app.chat._waited_for is not None)
        box.servers.futures[0].cancel()
        await answered(pilot, 2)
        assert said(app)[2] == ("tool", "Error: fs/add was stopped.")


async def test_a_model_that_calls_without_end_is_stopped(store, box, monkeypatch):
    monkeypatch.setattr(calling, "MOST_ROUNDS", 3)
    app = make_app(store, *[Script(calls=(ADD,)) for _ in range(5)], toolbox=box)
    async with app.run_test() as pilot:
        box.permissions.keep(box.tools()[0], "always")
        await say(pilot, "2 + 3?")
        await wait_until(pilot, lambda: "3 answers in a row" in screen_text(app))
        assert len(box.servers.called) == 3
        assert len(app.engine.requests) == 3
        await say(pilot, "/regen")
        await wait_until(pilot, lambda: len(app.engine.requests) == 4)


async def test_a_call_of_what_is_not_there_and_hostile_words(store, box):
    evil = ("\x1b[2Jrm", '{"a": "\x1b[31m\u202ex"}')
    box.servers.result = "\x1b[2J</think>"
    app = make_app(store, Script(calls=(evil,)), Script(calls=(ADD,)), "No.", toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "Go.")
        await wait_until(pilot, lambda: asks(pilot))
        assert "there is no tool" in said(app)[2][1]
        await pilot.press("o")
        await answered(pilot, 3)
        assert not any(c in screen_text(app) for c in "\x1b\u202e")


async def test_mcp_shows_servers_and_what_is_allowed(store, box):
    app = make_app(store, toolbox=box)
    async with app.run_test() as pilot:
        box.permissions.keep(box.tools()[0], "always")
        await say(pilot, "/mcp")
        await wait_until(pilot, lambda: "fs/add · always allowed" in screen_text(app))
        await pilot.press("escape")
        await say(pilot, "/mcp forget fs")
        await wait_until(pilot, lambda: "1 permission taken back" in screen_text(app))
        assert box.permissions.of(box.tools()[0]) is None
        await say(pilot, "/mcp xyz")
        await wait_until(pilot, lambda: "means nothing" in screen_text(app))


async def test_a_question_waits_for_servers_that_start_and_not_for_ever(store, box, monkeypatch):
    waits = ["fs"]
    monkeypatch.setattr(type(box), "waits_for", property(lambda self: waits))
    app = make_app(store, "Hi.", toolbox=box)
    async with app.run_test() as pilot:
        await say(pilot, "Hello")
        await wait_until(pilot, lambda: "waiting for MCP servers: fs" in screen_text(app))
        assert app.engine.requests == []
        waits.clear()
        await answered(pilot, 1)


async def test_a_server_that_fails_is_said_once(store, box):
    server = box.servers.servers[0]
    app = make_app(store, toolbox=box)
    async with app.run_test() as pilot:
        server.state, server.words = "ended", "it ended with code 7: dying"
        assert "fs is gone: it ended with code 7" in box.news()
        assert box.news() == ""
        assert box.offered() == []
        await pilot.pause()
