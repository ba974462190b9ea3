"""Chats that are deleted: brought back within a week, after that in no byte of any file."""

from __future__ import annotations

import json
import sqlite3

import pytest
from scripted import Script, screen_text, wait_until
from stored import add
from tui_helpers import answered, make_app, say

from tinychat.base import locations
from tinychat.chats import database
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.open_chat import OpenChat
from tinychat.tui.widgets.sidebar import ChatList

SECRET = "Zyzzogeton"


def talk(store, *lines):
    chat = store.create("demo", f"{SECRET} system" if SECRET in lines[0] else None)
    parent = None
    for i, text in enumerate(lines):
        whole = {"prompt_text": f"<{text}>", "finish_reason": "stop"}
        parent = add(store, chat.id, ("user", "assistant")[i % 2], text, parent, "demo", **whole)
    return store.chat(chat.id)


def spilled(folder):
    """Files that have the word, as it was written or as an index folds it."""
    return [
        p.name
        for p in folder.rglob("*")
        if p.is_file()
        and any(w in p.read_bytes() for w in (SECRET.encode(), SECRET.lower().encode(), b"yzzoget"))
    ]


@pytest.mark.parametrize("full_text", [True, False])
def test_a_wiped_chat_is_in_no_byte_of_any_file(tmp_path, monkeypatch, full_text):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    store = ChatStore(full_text=full_text)
    for i in range(30):
        talk(store, f"other chat {i}", "and its answer " * 30)
    gone = talk(store, f"{SECRET} and more", f"the {SECRET} is a weevil " * 300, f"{SECRET}?", "yes")
    kept = talk(store, "another", "answer")
    held = OpenChat(store, gone)
    for i, m in enumerate(held.tree.nodes):  # rows that grow leave copies behind
        m.content += f" {SECRET} again" * 50
        held.change(i)
        assert held.flush()
    held.close()
    store.lock(gone.id)()
    kv = locations.kv_file(str(gone.id))
    kv.parent.mkdir()
    kv.write_bytes(SECRET.encode())
    kv.with_suffix(".damaged").write_bytes(SECRET.encode())
    assert spilled(tmp_path)
    other = ChatStore(full_text=full_text)  # another program has the store open
    other.chats()
    store.delete(gone.id)
    assert store.purge() == 0
    assert store.purge(older_than=-1) == 1
    assert spilled(tmp_path) == []
    assert len(store.chats()) == 31
    assert [h.chat.id for h in store.search("another")] == [kept.id]
    for s in (store, other):
        s.close()
    assert spilled(tmp_path) == []


def test_wiping_that_fails_is_done_the_next_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    store = ChatStore()
    gone = talk(store, f"{SECRET} and more", "answer")
    store.delete(gone.id)
    with monkeypatch.context() as m:
        m.setattr(store._database, "wipe", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.purge(-1)
    assert store.purge(-1) == 1
    assert store.purge(-1) == 0
    assert spilled(tmp_path) == []
    store.close()


def test_what_an_earlier_version_only_removed_is_wiped_too(tmp_path):
    db = sqlite3.connect(tmp_path / "chats.db")
    db.execute("PRAGMA secure_delete = OFF")
    for statement in database.MIGRATIONS[0]:
        db.execute(statement)
    for chat, text in ((1, f"{SECRET} " * 2000), (2, "another")):
        db.execute(
            "INSERT INTO chats (title, model, params, created, updated) VALUES (?, 'm', '{}', 0, 0)", (text,)
        )
        db.execute(
            "INSERT INTO messages (chat, role, content, created) VALUES (?, 'user', ?, 0)", (chat, text)
        )
    db.execute("DELETE FROM messages WHERE chat = 1")
    db.execute("DELETE FROM chats WHERE id = 1")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    assert spilled(tmp_path)
    store = ChatStore(tmp_path / "chats.db")
    assert len(store.chats()) == 1
    store.purge()
    store.close()
    assert spilled(tmp_path) == []


def test_the_command_line_lists_and_brings_back(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tinychat.cli.main import cli

    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    store = ChatStore()
    for text in ("glaciers", "recipes", "rivers"):
        talk(store, text)

    def chats(*args):
        result = CliRunner().invoke(cli, ["chats", *args])
        return result.exit_code, result.output

    assert "Nothing was deleted" in chats("--deleted")[1]
    assert chats("rm", "1", "2")[0] == 0
    assert [c["title"] for c in json.loads(chats("--deleted", "--json")[1])] == ["recipes", "glaciers"]
    assert chats("restore", "1", "3")[0] != 0  # chat 3 is there
    assert [c.id for c in store.chats()] == [3]
    assert "“glaciers” is back" in chats("restore", "1")[1]
    assert chats("restore")[0] == 2
    assert chats("--deleted", "rivers")[0] == 2
    assert json.loads(chats("restore", "2", "--json")[1]) == {"restored": [2]}
    assert len(store.chats()) == 3
    assert store.deleted() == []
    store.close()


@pytest.mark.asyncio
async def test_the_screen_undoes_every_deletion_of_the_week_after_a_restart_too(store):
    for text in ("first", "second", "third"):
        talk(store, text, "answer")
    app = make_app(store, Script("about foxes"))
    async with app.run_test(size=(120, 30)) as pilot:
        await say(pilot, "the open one")
        await answered(pilot)
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "third" in screen_text(app))
        app.chat.query_one(ChatList).focus()
        await pilot.press("d", "d", "d")  # a key too many: the open chat is first in the list
        await wait_until(pilot, lambda: "This chat is open" in screen_text(app))
        assert len(store.chats()) == 4
        await pilot.press("down", "d", "d", "d", "d", "d")
        await wait_until(pilot, lambda: len(store.chats()) == 1)
        assert store.chats()[0].title == "the open one"
    app = make_app(store)
    async with app.run_test(size=(120, 30)) as pilot:
        await say(pilot, "/undo")
        await wait_until(pilot, lambda: "▌ first" in screen_text(app))
        assert "/undo again: “second”" in screen_text(app)
        await say(pilot, "/undo")
        await say(pilot, "/undo")
        await wait_until(pilot, lambda: len(store.chats()) == 4)
        await say(pilot, "/undo")
        await wait_until(pilot, lambda: "Nothing was deleted within a week" in screen_text(app))


@pytest.mark.asyncio
async def test_a_chat_that_is_open_elsewhere_is_not_deleted(store):
    talk(store, "theirs", "answer")
    release = store.lock(1)
    app = make_app(store)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "theirs" in screen_text(app))
        app.chat.query_one(ChatList).focus()
        await pilot.press("d")
        await wait_until(pilot, lambda: "open in another terminal" in screen_text(app))
        assert len(store.chats()) == 1
    release()
