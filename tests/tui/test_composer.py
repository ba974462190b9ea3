"""The composer: lines, history, completion, pastes and files, and what its commands refuse."""

from __future__ import annotations

import pytest
from scripted import screen_text, wait_until
from textual.widgets import OptionList
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.text.attachments import as_read
from tinychat.tui import clipboard, commands
from tinychat.tui.app import ChatApp
from tinychat.tui.theme import THEMES

pytestmark = pytest.mark.asyncio


# Branches


async def test_lines_history_and_completion(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"one", "ctrl+j", *"two", "enter")
        await answered(pilot)
        assert app.engine.requests[0].path[0].content == "one\ntwo"
        await pilot.press("up")
        assert app.chat.composer.text == "one\ntwo"
        await pilot.press("down")
        await pilot.press("down")
        assert app.chat.composer.text == ""
        await pilot.press(*"/sta")
        await wait_until(pilot, lambda: "speed over this chat" in screen_text(app))
        await pilot.press("tab")
        assert app.chat.composer.text == "/stats "
        await pilot.press("ctrl+u", *"/the", "enter")
        await wait_until(pilot, lambda: app.theme != THEMES[0].name)


async def test_enter_means_what_was_typed_though_the_list_lags_behind(store):
    """Keys in one burst: enter comes before the list has heard of them."""
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("/")
        await wait_until(pilot, lambda: "keys and commands" in screen_text(app))  # /help is the first
        composer = app.chat.composer
        composer.input.insert("stats")
        composer.input.action_submit()
        await wait_until(pilot, lambda: "Stats" in type(app.screen).__name__)
        await pilot.press("escape")
        composer.input.insert("/se")  # and no list at all yet
        composer.input.action_down()
        composer.input.action_complete()
        assert composer.text == "/set "
        await pilot.press("backspace", *"tings", "enter")  # no command
        await wait_until(pilot, lambda: "/settings is not a command. Did you mean /set" in screen_text(app))
        assert composer.text == "/settings"
        await pilot.press(*(["backspace"] * 5), *" top_p 7", "enter")
        await wait_until(pilot, lambda: "It must lie between 0 and 1" in screen_text(app))
        assert composer.text == "/set top_p 7"


async def test_one_key_clears_a_draft_and_up_brings_it_back_with_its_paste(store):
    from textual import events

    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        composer = app.chat.composer
        await say(pilot, "said before")
        await answered(pilot)
        composer.input.post_message(events.Paste("line of text\n" * 800))
        await wait_until(pilot, lambda: "paste 1" in screen_text(app))
        await pilot.press(*"a draft", "ctrl+l")
        assert composer.text == ""
        await wait_until(pilot, lambda: "paste 1" not in screen_text(app))
        await pilot.press("up")
        assert composer.text == "a draft"
        await wait_until(pilot, lambda: "paste 1" in screen_text(app))
        await pilot.press("up")
        assert composer.text == "said before"


async def test_what_is_typed_takes_the_place_of_a_recalled_message(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        composer = app.chat.composer
        for i, text in enumerate(("one\ntwo", "three")):
            await say(pilot, text)
            await answered(pilot, i + 1)
        await pilot.press(*"half", "up", "up")
        assert composer.text == "one\ntwo"
        await pilot.press(*"new")
        assert composer.text == "new"
        await pilot.press("up")
        assert composer.text == "half"  # the draft from before is not lost
        await pilot.press("up")
        assert composer.text == "three"
        await pilot.press("end", *"!")  # a key that moves makes a draft of it
        assert composer.text == "three!"
        await pilot.press("ctrl+l", "up", "backspace")
        assert composer.text == ""


async def test_more_below_is_said_after_scrolling_up(store):
    app = make_app(store, "line\n\n" * 60)
    async with app.run_test(size=(60, 20)) as pilot:
        await say(pilot, "long")
        await answered(pilot)
        await wait_until(pilot, lambda: app.chat.transcript.max_scroll_y > 40)
        assert "more below" not in screen_text(app)
        await pilot.press("pageup")
        await wait_until(pilot, lambda: "↓ more below · ctrl+end" in screen_text(app))
        await pilot.press("ctrl+end")
        await wait_until(pilot, lambda: "more below" not in screen_text(app))


async def test_a_long_paste_is_attached_and_shown_folded(store):
    from textual import events

    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.input.post_message(events.Paste("line of text\n" * 8000))
        await wait_until(pilot, lambda: "paste 1  104 kB, 24,000 of 4,032 tokens" in screen_text(app))
        assert app.chat.composer.text == ""
        await pilot.press("backspace")
        await wait_until(pilot, lambda: "paste 1" not in screen_text(app))
        app.chat.composer.input.post_message(events.Paste("line of text\n" * 8000))
        await wait_until(pilot, lambda: "paste 1" in screen_text(app))
        await pilot.press(*"what", "enter")
        await wait_until(pilot, lambda: "Send all of it" in screen_text(app))
        await pilot.press("down", "enter")
        await answered(pilot)
        assert "▌ + paste 1  104 kB" in screen_text(app)
    sent = read_by_model(app.engine.requests[0])
    assert sent.count("line of text") == 8000
    assert sent.endswith("\n\nwhat")


async def test_files_are_attached_with_their_size_and_tokens(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("alpha beta gamma")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"see @no")
        await wait_until(pilot, lambda: bool(pilot.app.screen.query(OptionList)))
        await pilot.press("tab")
        assert app.chat.composer.text == "see @notes.txt "
        await wait_until(pilot, lambda: "notes.txt  16 B, 3 of 4,032 tokens" in screen_text(app))
        await pilot.press(*"and @picture.png")
        await wait_until(pilot, lambda: "not a UTF-8 text file" in screen_text(app))
        await pilot.press("escape", "enter", "enter")  # refused, then sent without it
        await answered(pilot)
    sent = read_by_model(app.engine.requests[0])
    assert sent == "notes.txt:\n```\nalpha beta gamma\n```\n\nsee @notes.txt and @picture.png"


async def test_a_fence_in_a_file_does_not_end_its_fence():
    message = as_read("x", [{"name": "a.md", "text": "```\ncode\n```"}])
    assert message.startswith("a.md:\n````\n```\ncode\n```\n````")


async def test_commands_are_told_from_paths():
    assert commands.split("/set top_k 3") == ("set", "top_k 3")
    assert commands.split("/usr/bin/env is a path") is None
    assert commands.split("/help\nmore") is None
    assert commands.split("text") is None


async def test_wrong_commands_say_what_to_do(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        for command, expected in (
            ("/nonsense", "/nonsense is not a command"),
            ("/set top_p 7", "It must lie between 0 and 1"),
            ("/set colour 7", "colour is not a sampling parameter"),
            ("/save", "/save needs FILE"),
            ("/regen", "Say something first"),
            ("/copy", "There is no answer yet"),
            ("/branch 3", "There is no answer yet"),
            ("/theme purple", "There is no theme purple"),
            ("/undo", "Nothing was deleted within a week"),
            ("/delete", "This chat is still empty"),
        ):
            await say(pilot, command)
            await wait_until(pilot, lambda expected=expected: expected in screen_text(app))


# Copying, saving


async def test_nothing_is_copied_or_written_unasked(store, monkeypatch, tmp_path):
    copied = []
    monkeypatch.setattr(ChatApp, "copy_to_clipboard", lambda self, text: copied.append(text))
    monkeypatch.setattr(clipboard.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    app = make_app(store, "Text.\n\n```sh\nrm \x1b[31m-rf\n```\n\x1b]52;c;aGk=\x07")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        assert copied == []
        await say(pilot, "/copy code")
        await say(pilot, "/copy")
        await say(pilot, "/copy chat")
        await wait_until(pilot, lambda: len(copied) == 3)
        assert copied[0] == "rm ␛[31m-rf\n"
        assert "\x1b" not in "".join(copied)
        assert copied[2].count("**") == 4
        await pilot.click("Turn.assistant", offset=(0, 0))
        await pilot.press("s")
        await wait_until(pilot, lambda: "Save the code block as" in screen_text(app))
        await pilot.press(*"x.sh", "enter")
        await wait_until(pilot, lambda: (tmp_path / "x.sh").exists())
        await pilot.press("s", *"x.sh", "enter")
        await wait_until(pilot, lambda: "exists" in screen_text(app))
        await say(pilot, f"/save {tmp_path}/chat.json")
        await wait_until(pilot, lambda: (tmp_path / "chat.json").exists())
        await say(pilot, f"/save {tmp_path}/chat.md")
        await wait_until(pilot, lambda: (tmp_path / "chat.md").exists())
    assert {p.name for p in tmp_path.iterdir() if p.suffix in (".sh", ".json", ".md")} == {
        "x.sh", "chat.json", "chat.md", *(["settings.json"] if (tmp_path / "settings.json").exists() else []),
    }  # fmt: skip


# Chats
