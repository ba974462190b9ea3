"""What models say and what files are called is shown, never obeyed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from scripted import Script, screen_text, wait_until
from terminal import Terminal
from textual.app import App
from textual.widgets import OptionList
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.tui.messages import Submitted
from tinychat.tui.text import clean, plain

SCREEN = [sys.executable, str(Path(__file__).parent / "open_screen.py")]
NAMES = (
    "$(touch pwned).txt",
    "; touch pwned;.txt",
    "`touch pwned`.txt",
    "[@click=app.quit]x.txt",
    "--help.txt",
    "esc\x1b]0;pwned\x07.txt",
    "new\nline.txt",
)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_terminal_is_not_moved_by_a_hostile_answer(tmp_path):
    with Terminal(SCREEN, TINYCHAT_HOME=str(tmp_path)) as t:
        t.accept_clipboard()
        t.wait("ready · ")
        t.type("hostile")
        t.press("Enter")
        shown = t.wait(lambda s: "the end" in s and "tok/s" in s, 60)
        assert "rm ␛[1m-rf /tmp/nothing" in shown
        t.press("C-Up", "Home", "End")  # to the first message and back
        t.press("PageUp", "PageDown")
        assert t.screen.rstrip().splitlines()[-1].lstrip().startswith("ready · ")
        assert (t.title, t.clipboard) == ("hostile · tinychat", "")  # what was asked, no more
        assert t.modes.startswith("1 ")  # still its own screen
        t.type("b")  # asked for, it is copied; without what could be obeyed
        t.wait("Copied the code block")
        t.wait(lambda _: t.clipboard)
        assert t.clipboard == "rm ␛[1m-rf /tmp/nothing\n"
        t.press("Escape")
        t.type("next")  # nothing was typed by an answer of the terminal
        t.press("Enter")
        t.wait("echo: next")
        t.press("C-q")
        t.wait("ended with 0")
        assert t.modes == "0 0 1"


@pytest.mark.asyncio
async def test_links_are_shown_and_never_opened(store, monkeypatch):
    opened = []
    monkeypatch.setattr(App, "open_url", lambda self, url, **_: opened.append(url))
    monkeypatch.setattr("webbrowser.open", lambda url, *_, **__: opened.append(url))
    app = make_app(
        store, "[a link](https://evil.example) <https://two.example> ![picture](https://x.example)"
    )
    async with app.run_test(size=(110, 30)) as pilot:
        await say(pilot, "https://three.example")
        await answered(pilot)
        assert (
            "a link (https://evil.example) https://two.example [picture] (https://x.example)"
            in screen_text(app)
        )
        for turn in app.chat.transcript.turns:
            for x in range(0, 100, 8):
                await pilot.click(turn, offset=(x, 0))
        strips = app.screen._compositor.render_strips()
        assert not any(s.style.link for strip in strips for s in strip if s.style)
    assert opened == []


@pytest.mark.asyncio
async def test_what_is_edited_or_recalled_is_harmless(store):
    app = make_app(store, "Well.")
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.post_message(Submitted("red \x1b[31m\x9b text"))  # as with a file that has such text
        await answered(pilot)
        await say(pilot, "/edit")
        assert app.chat.composer.text == "red ␛[31m\ufffd text"
        await pilot.press("escape", "up")
        assert app.chat.composer.text == "red ␛[31m\ufffd text"
        await pilot.press("ctrl+u", "ctrl+b")
        await wait_until(pilot, lambda: "2 messages" in screen_text(app))
        await pilot.press("tab", "r")
        await wait_until(pilot, lambda: "New title" in screen_text(app))
        assert not {"\x1b", "\x9b"} & set(screen_text(app))


@pytest.mark.asyncio
async def test_a_models_name_is_harmless(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "/model ./evil\x1b[31m.gguf")
        await wait_until(pilot, lambda: "evil" in plain(app.chat.status.layout_lines(100)[0]))
        await pilot.press("f2")
        await wait_until(pilot, lambda: "Speed of this chat" in screen_text(app))
        assert "\x1b" not in screen_text(app)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", NAMES)
async def test_the_name_of_a_file_is_only_a_name(store, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("content")
    app = make_app(store, Script("Fine."))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("@")
        await pilot.pause()
        if name.isprintable():
            await wait_until(pilot, lambda: bool(app.screen.query(OptionList)))
            await pilot.press("tab")
        app.chat.composer.text = f'see @"{name}"'
        await pilot.pause()
        await pilot.press("escape", "enter")
        if not name.isprintable():  # no such file can be meant: enter again sends the name as text
            await wait_until(pilot, lambda: "enter again sends" in " ".join(screen_text(app).split()))
            await pilot.press("enter")
        await answered(pilot)
        await say(pilot, "/save " + name.replace("\n", " ") + ".md")
        await wait_until(pilot, lambda: "Wrote" in screen_text(app))
        assert "\x1b" not in screen_text(app)
        assert app.is_running
    sent = read_by_model(app.engine.requests[0])
    assert ("content" in sent) == name.isprintable()  # others cannot be written in a message
    assert not (tmp_path / "pwned").exists()
    written = {p.name for p in tmp_path.iterdir()} - {name, "locks"}
    assert {n for n in written if not n.startswith(("chats.db", "settings.json"))} == {
        clean(name).replace("\n", " ") + ".md"
    }
