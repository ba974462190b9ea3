"""Everything that keys do at a message, in a list or in the sidebar is also done by a click."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from textual.events import MouseScrollUp
from textual.widgets import OptionList
from tui_helpers import answered, make_app, say

from tinychat.tui import clipboard
from tinychat.tui.widgets.sidebar import ChatList

pytestmark = pytest.mark.asyncio
CODE = "Look:\n\n```python\nx = 1\n```\n\nand\n\n```sh\nls\n```\n"


async def click_on(pilot, text, nth=0):
    """Click on a text where it stands on the screen."""
    places = [
        (line.index(text), y) for y, line in enumerate(screen_text(pilot.app).splitlines()) if text in line
    ]
    x, y = places[nth]
    await pilot.click(offset=(x, y))


async def test_code_blocks_are_copied_and_saved(store, monkeypatch, tmp_path):
    copied = []
    monkeypatch.setattr(clipboard, "copy", lambda app, text: copied.append(text))
    monkeypatch.chdir(tmp_path)
    app = make_app(store, CODE)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "code")
        await answered(pilot)
        await click_on(pilot, "copy save", 0)
        await click_on(pilot, "copy save", 1)
        await wait_until(pilot, lambda: copied == ["x = 1\n", "ls\n"])
        await click_on(pilot, "save", 0)
        await wait_until(pilot, lambda: "Save the code block as" in screen_text(app))
        await pilot.press(*"a.py", "enter")
        await wait_until(pilot, lambda: (tmp_path / "a.py").exists())
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


async def test_branches_are_switched_and_reasoning_is_opened(store):
    app = make_app(store, "<think>why so</think>first", "second")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await click_on(pilot, "▸ thought")
        await wait_until(pilot, lambda: "why so" in screen_text(app))
        await pilot.press("escape", "ctrl+r")
        await wait_until(pilot, lambda: "‹ 2/2 ›" in screen_text(app) and not app.chat.answering)
        await click_on(pilot, "‹")
        await wait_until(pilot, lambda: "‹ 1/2 ›" in screen_text(app) and "first" in screen_text(app))
        await click_on(pilot, "›")
        await wait_until(pilot, lambda: "‹ 2/2 ›" in screen_text(app) and "second" in screen_text(app))


async def test_a_completion_and_a_chat_are_chosen(store):
    app = make_app(store, "about foxes", "about rivers")
    async with app.run_test(size=(120, 30)) as pilot:
        await say(pilot, "first chat")
        await answered(pilot)
        await pilot.press(*"/re")
        await wait_until(pilot, lambda: "/rename [TITLE]" in screen_text(app))
        await click_on(pilot, "/rename [TITLE]")
        await wait_until(pilot, lambda: app.chat.composer.text == "/rename ")
        await pilot.press("ctrl+u", "ctrl+n")
        await say(pilot, "second chat")
        await answered(pilot)
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "first chat" in screen_text(app))
        await click_on(pilot, "first chat")
        await wait_until(pilot, lambda: "▌ first chat" in screen_text(app))
        assert "about foxes" in screen_text(app)


async def test_the_wheel_scrolls_and_leaves_the_end(store):
    app = make_app(store, "\n\n".join(f"paragraph {i}" for i in range(60)))
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "one")
        await answered(pilot)
        await wait_until(pilot, lambda: "paragraph 59" in screen_text(app))
        for _ in range(12):
            turn = app.chat.transcript.turns[-1]
            turn.post_message(MouseScrollUp(turn, 20, 8, 0, -1, 0, False, False, False))
        await wait_until(pilot, lambda: "paragraph 59" not in screen_text(app))
        assert not app.chat.transcript.following


async def test_the_list_of_chats_renames_deletes_undoes_and_exports(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = make_app(store, Script("about foxes"))
    async with app.run_test(size=(120, 30)) as pilot:
        await say(pilot, "first chat")
        await answered(pilot)
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "2 messages" in screen_text(app))
        app.chat.query_one(ChatList).focus()
        await pilot.press("r")
        await wait_until(pilot, lambda: "New title" in screen_text(app))
        await pilot.press("ctrl+u", *"better", "enter")
        await wait_until(pilot, lambda: store.chat(1).title == "better")
        app.chat.query_one(ChatList).focus()
        await pilot.press("x")
        await wait_until(pilot, lambda: "Export as" in screen_text(app))
        await pilot.press(*"chat.md", "enter")
        await wait_until(pilot, lambda: (tmp_path / "chat.md").exists())
        assert "about foxes" in (tmp_path / "chat.md").read_text()
        app.chat.query_one(ChatList).focus()
        await pilot.press("d", "d")
        await wait_until(pilot, lambda: "This chat is open" in screen_text(app))
        await say(pilot, "/delete")
        await wait_until(pilot, lambda: store.chats() == [])
        app.chat.query_one(ChatList).focus()
        await pilot.press("u")
        await wait_until(pilot, lambda: len(store.chats()) == 1)
        await wait_until(pilot, lambda: "▌ first chat" in screen_text(app))


@pytest.mark.parametrize("size", [(60, 20), (200, 60)])
async def test_every_panel_fits(store, size):
    app = make_app(store)
    async with app.run_test(size=size) as pilot:
        for key, last in (
            ("ctrl+o", "enter loads"),
            ("ctrl+t", "esc: close"),
            ("f2", "no answer yet"),
            ("f1", "The composer"),
        ):
            await pilot.press(key)
            await wait_until(pilot, lambda last=last: last in screen_text(app))
            if key == "ctrl+o":
                assert "or type a name" in screen_text(app)
                app.screen.query_one(OptionList).add_options([f"model {i}" for i in range(40)])
                await pilot.pause()
                assert "or type a name" in screen_text(app)
                assert "enter loads" in screen_text(app)
            await pilot.press("escape")
            await wait_until(pilot, lambda: app.screen is app.chat)
        await pilot.press(*"/s")
        await wait_until(pilot, lambda: "/system [TEXT]" in screen_text(app))
        lines = [line for line in screen_text(app).splitlines() if line.lstrip().startswith("/")]
        assert [line.split()[0] for line in lines] == ["/system", "/set", "/save", "/stats"]
