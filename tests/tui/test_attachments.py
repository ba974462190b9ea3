"""Files in the composer and in messages: sent once, shown as chips, edited without being said again."""

from __future__ import annotations

import pytest
from scripted import screen_text, wait_until
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.tui.conversation import Conversation

pytestmark = pytest.mark.asyncio


def files(app, n=-1):
    return [a["name"] for a in app.engine.requests[n].path[-1].attachments]


async def test_the_question_is_shown_and_names_the_chat_and_an_edit_sends_the_file_once(
    store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("first version\n" * 40)
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.paste("pasted " * 1000)
        await say(pilot, "compare @notes.md with it")
        await answered(pilot)
        text = screen_text(app)
        assert "▌ compare @notes.md with it" in text
        assert "▌ + notes.md  560 B" in text
        assert "▌ + paste 1  7.0 kB" in text
        assert "first version" not in text
        assert files(app) == ["notes.md", "paste 1"]
        assert store.chats()[0].title == "compare @notes.md with it"

        (tmp_path / "notes.md").write_text("second version")
        await say(pilot, "/edit")
        assert app.chat.composer.text == "compare @notes.md with it"
        assert [a.name for a in app.chat.composer.attachments] == ["notes.md", "paste 1"]
        await pilot.press("end", *" please", "enter")
        await answered(pilot)
        assert files(app) == ["notes.md", "paste 1"]
        assert read_by_model(app.engine.requests[-1]).count("first version") == 40  # as it was sent
        await say(pilot, "/edit shorter")
        await wait_until(pilot, lambda: len(app.engine.requests) == 3)
        assert files(app) == ["notes.md", "paste 1"]

        app.chat.conversation.close()
    conversation = Conversation.open(store, store.chats()[0].id)
    again = make_app(store, conversation=conversation)
    async with again.run_test(size=(100, 30)) as pilot:
        assert "+ notes.md" in screen_text(again)
        await say(pilot, "more")
        await wait_until(pilot, lambda: again.engine.requests)
    first = again.engine.requests[0].path[0]
    assert [a["name"] for a in first.attachments] == ["notes.md", "paste 1"]


async def test_a_file_can_be_taken_out_while_editing(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.paste("x" * 5000)
        await say(pilot, "see @a.txt")
        await answered(pilot)
        await say(pilot, "/edit")
        await pilot.press("ctrl+u", "backspace")
        assert app.chat.composer.attachments == []
        await say(pilot, "see nothing")
        await answered(pilot)
        assert files(app) == []


async def test_a_message_of_files_alone_is_one(store):
    app = make_app(store)
    async with app.run_test(size=(60, 20)) as pilot:
        app.chat.composer.paste("\u202enot\x1b[31m " * 1000)
        await pilot.press("enter")
        await answered(pilot)
        assert "▌ + paste 1" in screen_text(app)
    assert store.chats()[0].title == "paste 1"
