"""Nothing that is typed, set or left behind by an editor ends the screen."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from scripted import screen_text
from tui_helpers import answered, make_app, say

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.tui import attachments
from tinychat.tui.app import ChatApp

WORDS = {
    "/branch ²": "There is no branch ²",
    "/branch " + "1" * 5000: "There is no branch 1",
    "/save " + "a" * 300: "Cannot write a",
    "/save " + "a/" * 3000: "Cannot write a",
    "/set seed ²": "is not a number",
    "/set seed " + "1" * 5000: "1" * 90,
}


@pytest.mark.asyncio
async def test_words_that_are_no_numbers_and_no_names_are_refused_in_a_line(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = make_app(store, "one")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "hello")
        await answered(pilot)
        for words, answer in WORDS.items():
            name, _, rest = words[1:].partition(" ")
            await app.chat.run_command(name, rest)
            await pilot.pause()
            shown = "".join(screen_text(app).split())
            assert "".join(answer.split()) in shown, words
        with pytest.raises(TinychatError, match="not the name of a file"):
            app.chat.write_file(tmp_path / "a\0b", "text")
    assert not list(tmp_path.glob("a*"))


def test_a_home_of_nobody_is_a_name_like_any_other():
    for text in ("~a\0b", "~nobody-of-that-name"):
        assert str(locations.written(text)) == text
    assert attachments.mentions("see @~a\0b") == []
    assert attachments.complete_path("~a\0b/c") == []


@pytest.mark.parametrize("content", ['{"theme": []}', '{"theme": {}}', "[" * 100_000, "5", '{"theme": "?"}'])
def test_settings_that_make_no_sense_are_the_defaults(store, tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    assert make_app(store).theme == "tinychat-dark"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "editor",
    ["rm -f", "sh -c 'rm -f $0; mkdir $0'", "sh -c 'rm -f $0; mkfifo $0'"],
    ids=["gone", "folder", "pipe"],
)
async def test_an_editor_that_leaves_no_file_loses_nothing(store, monkeypatch, editor):
    monkeypatch.setenv("EDITOR", editor)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setattr(ChatApp, "suspend", lambda self: nullcontext())
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.text = "what was begun"
        await app.chat.action_editor()
        await pilot.pause()
        assert app.chat.composer.text == "what was begun"
        assert "cannot go through a file" in screen_text(app)


@pytest.mark.asyncio
async def test_no_room_for_an_editor_loses_nothing(store, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.text = "what was begun"
        await app.chat.action_editor()
        await pilot.pause()
        assert app.chat.composer.text == "what was begun"
        assert "No space left on device" in screen_text(app)
