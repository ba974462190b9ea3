"""Searching the chats: the list, and the places in the chat that is opened."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from branchy import answer, held, question
from pictures import compare
from scripted import Script, screen_text, wait_until
from terminal import Terminal
from textual import __version__ as textual_version
from tui_helpers import make_app, say

from tinychat.chats.chat_store import ChatStore
from tinychat.conversation import Tree
from tinychat.tui.text import plain
from tinychat.tui.widgets.sidebar import ChatList, Search

pytestmark = pytest.mark.asyncio
FAR = "Waves. " * 400
LONG = f"The sea is salt. Then a glacier calves.\n\n{FAR}\n\n- one glacier\n- two Glaciers"


def fill(store):
    """A chat with hits on both of its branches and in a thought, and two others."""
    nodes = [question("Tell me about the sea"), answer(LONG, 0), answer("Only water.", 0)]
    nodes += [question("And ice?", 1), answer("<think>a gläcier is hidden here</think>\n\nYes.", 3)]
    nodes += [question("What else?", 2)]
    for tree in (Tree(nodes, 5), Tree([question("Rivers")], 0), Tree([question("氷河 glacier " * 9)], 0)):
        held(store, tree).close()


def highlighted(app):
    return [
        text
        for turn in app.chat.transcript.turns
        for line in turn.layout_lines(turn.content_size.width)
        for text, style in line
        if "found" in style
    ]


async def opened(pilot, words):
    await pilot.press("ctrl+b")
    await wait_until(pilot, lambda: bool(pilot.app.query(Search)))
    pilot.app.chat.sidebar.find(words)
    await pilot.pause()


async def test_a_chat_opens_at_the_place_and_n_goes_on_over_all_branches(store):
    fill(store)
    app = make_app(store)
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(pilot, "glacier")
        await pilot.press("down", "down")
        assert isinstance(app.focused, ChatList)
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Message 1 of 2, place 1 of 3 · n next" in screen_text(app))
        assert "a glacier calves" in screen_text(app)
        assert highlighted(app) == ["glacier", "glacier", "Glacier"]
        for key, place, seen in (
            ("n", "Message 1 of 2, place 2 of 3", "• one glacier"),
            ("n", "Message 1 of 2, place 3 of 3", "• two Glaciers"),
            ("n", "Message 2 of 2", "a gläcier is hidden"),  # in a thought, which opens
            ("n", "Message 1 of 2, place 1 of 3", "a glacier calves"),
            ("N", "Message 2 of 2", "a gläcier is hidden"),
            ("N", "Message 1 of 2, place 3 of 3", "• two Glaciers"),
        ):
            await pilot.press(key)
            await wait_until(pilot, lambda p=place, s=seen: p in screen_text(app) and s in screen_text(app))
        turn = app.chat.transcript.turn(1)
        marked = turn.layout_lines(turn.content_size.width)
        turn.mark(None)
        assert highlighted(app) == []
        assert list(map(plain, turn.layout_lines(turn.content_size.width))) == list(map(plain, marked))
        await say(pilot, "/new")
        await wait_until(pilot, lambda: "Ask something" in screen_text(app))
        assert app.chat.found is None


async def test_n_without_a_search_says_where_one_searches(store):
    app = make_app(store, conversation=held(store, Tree([question("a")], 0)))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+up", "n")
        await wait_until(pilot, lambda: "Nothing was searched for" in screen_text(app))


async def test_another_branch_is_not_shown_while_an_answer_is_made(store):
    fill(store)
    app = make_app(store, Script("one two", hang=True))
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "sea")
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Only water." in screen_text(app))
        await say(pilot, "go on")
        await wait_until(pilot, lambda: "one two" in screen_text(app))
        app.chat.sidebar.find("calves")
        await wait_until(pilot, lambda: "calves" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Still answering" in screen_text(app))
        await pilot.press("escape")


async def test_the_keys_of_field_and_list_are_hinted_and_lead_into_each_other(store):
    fill(store)
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "")
        await wait_until(pilot, lambda: "↓ to the list" in screen_text(app))
        await pilot.press("down")
        await wait_until(pilot, lambda: "r rename" in screen_text(app))
        await pilot.press("down", "up", "up")
        await wait_until(pilot, lambda: isinstance(app.focused, Search))
        await pilot.press(*"zebra")
        await wait_until(pilot, lambda: "Nothing found." in screen_text(app))
        await pilot.press("down")  # there is no list
        assert isinstance(app.focused, Search)
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.focused is app.chat.composer.input)


async def test_a_list_that_is_cut_says_so(store, monkeypatch):
    fill(store)
    monkeypatch.setattr("tinychat.tui.widgets.sidebar.MOST", 2)
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await opened(pilot, "")
        await wait_until(pilot, lambda: "… and older ones" in screen_text(app))
        await pilot.press("down", "end", "d")
        await pilot.pause()
        assert app.chat.sidebar.query_one(ChatList).highlighted == 1


@pytest.mark.skipif(textual_version != "8.2.8", reason="snapshots are of Textual 8.2.8")
@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 36)])
async def test_what_a_search_looks_like(store, size, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    fill(store)
    app = make_app(store)
    async with app.run_test(size=size) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        await opened(pilot, "glacier")
        await pilot.press("down", "down")
        await wait_until(pilot, lambda: "r rename" in screen_text(app))
        await compare(f"search-{size[0]}x{size[1]}", app, pilot)
        await pilot.press("enter")
        await wait_until(pilot, lambda: "place 1 of 3" in screen_text(app))
        await compare(f"found-{size[0]}x{size[1]}", app, pilot)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
async def test_the_tree_and_a_search_in_a_real_terminal(tmp_path):
    store = ChatStore(tmp_path / "chats.db")
    fill(store)
    store.close()
    screen = [sys.executable, str(Path(__file__).parent / "open_screen.py"), "1"]
    with Terminal(screen, 60, 20, TINYCHAT_HOME=str(tmp_path)) as t:
        t.wait("ready ·")
        t.press("F3")
        t.wait("3 branches")
        t.press("Up", "Enter")
        t.wait("Waves.")
        t.press("C-b")
        t.wait("Search the chats")
        t.type("glacier")
        t.wait("a glacier calves")
        t.press("Down", "Enter")  # the open chat is the one that is chosen
        t.wait("Message 1 of 2, place 1 of 3")
        t.press("n")
        t.wait("• one glacier")
        t.press("n", "n")
        t.wait("a gläcier is hidden")
        t.press("C-q")
        t.wait("ended with 0")


async def test_excerpts_are_printed_and_a_cut_list_is_said(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tinychat.cli.main import cli

    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.setattr("tinychat.cli.chats.MOST", 2)
    store = ChatStore()
    fill(store)
    for i in range(2):
        held(store, Tree([question(f"more glaciers {i}")], 0)).close()
    store.close()
    found = CliRunner().invoke(cli, ["chats", "glacier", "calves"])
    assert "Then a glacier calves. Waves." in found.stdout
    assert len(found.stdout.splitlines()) == 1
    assert found.stderr == ""
    cut = CliRunner().invoke(cli, ["chats", "glacier"])
    assert len(cut.stdout.splitlines()) == 2
    assert "There are more than these 2, the newest." in cut.stderr
    assert "--all shows all" in cut.stderr
    everything = CliRunner().invoke(cli, ["chats", "glacier", "--all"])
    assert len(everything.stdout.splitlines()) == 4
    assert everything.stderr == ""
    listed = CliRunner().invoke(cli, ["chats"])
    assert "There are more than these 2" in listed.stderr
