"""A full disk, a file that others hold, delete or damage while a conversation runs: nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from cli_helpers import GREEDY, TINYCHAT, tinychat
from scripted import Script, screen_text, wait_until
from stored import add
from tiny import tiny_folder, tiny_model
from tui_helpers import answered, make_app, say

from tinychat.base.errors import TinychatError
from tinychat.chats import open_chat
from tinychat.chats.chat_store import Chat, ChatStore, StoreError
from tinychat.chats.keeper import Keeper
from tinychat.conversation import Message
from tinychat.tui import app as app_module

HOLD = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path):
    """Another process has the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            other.stdin.close()
            other.wait()


@contextmanager
def full(store):
    """No page more, as on a disk without room."""
    db = store._database._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    yield
    db.execute("PRAGMA max_page_count = 1000000")


@contextmanager
def read_only(store):
    store._database._db.execute("PRAGMA query_only = ON")
    store._database._doubted = store.generation  # its file needs no second look
    yield
    store._database._db.execute("PRAGMA query_only = OFF")


PROBLEMS = {"full": full, "locked": lambda store: held(store.path), "read-only": read_only}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Attempts follow each other without much waiting."""
    monkeypatch.setattr(open_chat, "AGAIN", 0.05)
    monkeypatch.setattr(open_chat, "PATIENCE", 0.05)
    monkeypatch.setattr(open_chat, "LONG", 0.0)
    monkeypatch.setattr(app_module, "POLL_SECONDS", 0.1)


LONG_TEXT = "long " * 5_000


@pytest.mark.parametrize("cause", PROBLEMS)
def test_what_cannot_be_written_is_said_for_what_it_is(store, cause):
    chat = store.create("demo")
    store.patience = 0.05
    with PROBLEMS[cause](store):
        for call in (
            lambda: add(store, chat.id, "user", LONG_TEXT, None),
            lambda: store.create("demo", LONG_TEXT),
            lambda: store.update(chat.id, system=LONG_TEXT),
        ):
            with pytest.raises(StoreError) as e:
                call()
            assert e.value.cause == cause
            assert "move" not in e.value.todo.lower()
            assert str(store.path) in e.value.what
        assert store.chats() == []  # reading goes on
    add(store, chat.id, "user", LONG_TEXT, None)
    assert store.chat(chat.id).messages == 1


@pytest.mark.parametrize("cause", PROBLEMS)
def test_a_chat_is_stored_once_there_is_room(store, cause):
    chat = open_chat.OpenChat(store, Chat(0, "", "demo"))
    with PROBLEMS[cause](store):
        question = chat.add(Message("user", LONG_TEXT))
        assert not chat.flush()
        answer = chat.add(Message("assistant", "well", question, model="demo"))
        chat.tree.nodes[answer].finish_reason = "stop"
        chat.change(answer)
        assert not chat.flush()
        assert "kept in memory" in chat.news()
        assert chat.news() == ""  # once
        assert chat.loss().startswith("2 messages are not stored. ")
    assert chat.flush()
    assert (chat.news(), chat.news(), chat.loss()) == ("The chat is stored again.", "", "")
    stored = store.messages(chat.chat.id)
    assert [(m.role, m.content) for m in stored] == [("user", LONG_TEXT), ("assistant", "well")]
    assert stored[1].parent == 0
    assert store.tree(chat.chat.id)[1].leaf == 1
    assert not store.unsaved
    chat.close()


def test_a_file_that_is_mended_meanwhile_is_said_once(store):
    chat = open_chat.OpenChat(store, Chat(0, "", "demo"))
    chat.add(Message("user", "mine"))
    assert chat.flush()
    with store._database._lock:
        store._database._mend()
    assert "1 chats with 1 messages were saved" in chat.news()
    assert chat.news() == ""
    chat.add(Message("user", "more"))
    assert chat.flush()
    assert [m.content for m in store.messages(1)] == ["mine", "more"]


def test_it_is_stored_without_another_word_said(store):
    chat = open_chat.OpenChat(store, Chat(0, "", "demo"))
    with held(store.path):
        chat.add(Message("user", "hello"))
        chat.close()  # another chat is opened: this one is not forgotten
        assert chat in store.unsaved
    for _ in range(200):
        if not store.unsaved:
            break
        chat._writing.acquire(timeout=0.05)
        chat._writing.release()
        open_chat.time.sleep(0.02)
    assert [m.content for m in store.messages(1)] == ["hello"]
    store.lock(1)()  # and others may have it


@pytest.mark.parametrize("how", ["file", "folder", "replaced", "damaged"])
def test_a_store_that_vanishes_is_begun_anew_with_what_is_open(tmp_path, how):
    home = tmp_path / "home"
    store = ChatStore(home / "chats.db")
    if how == "replaced":
        other = ChatStore(tmp_path / "other.db")
        for text in ("theirs", "theirs too"):
            add(other, other.create("demo").id, "user", text, None)
        other.close()
    chat = open_chat.OpenChat(store, Chat(0, "", "demo"))
    question = chat.add(Message("user", "mine"))
    assert chat.flush()
    if how == "folder":
        shutil.rmtree(home)
    elif how == "damaged":
        store._database._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with store.path.open("r+b") as f:
            f.write(b"\xff" * store.path.stat().st_size)
    else:
        for path in home.glob("chats.db*"):
            path.unlink()
        if how == "replaced":
            os.rename(tmp_path / "other.db", store.path)
    chat.add(Message("assistant", "and yours", question, model="demo"))
    assert chat.flush()
    store.close()
    again = ChatStore(home / "chats.db")
    assert [m.content for m in again.messages(chat.chat.id)] == ["mine", "and yours"]
    assert ("set aside" in again.notice) == (how == "damaged")
    texts = sorted(m.content for c in again.chats() for m in again.messages(c.id))
    assert texts == sorted(["mine", "and yours", *(["theirs", "theirs too"] if how == "replaced" else [])])
    again.close()


def test_a_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True
        ).returncode
    ):
        pytest.skip("needs a file system of its own (mount)")
    try:
        store = ChatStore(mount / "chats.db")
        chat = open_chat.OpenChat(store, Chat(0, "", "demo"))
        chat.add(Message("user", "a small one"))
        assert chat.flush()
        (mount / "filler").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_bsize))
        chat.add(Message("user", LONG_TEXT * 3))
        assert not chat.flush()
        assert chat.problem.cause == "full"
        assert [x.content for x in store.messages(1)] == ["a small one"]
        with pytest.raises(StoreError, match="is full"):
            ChatStore(mount / "another.db")
        (mount / "filler").unlink()
        assert chat.flush()
        assert [x.content for x in store.messages(1)] == ["a small one", LONG_TEXT * 3]
        store.close()
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


# The plain conversation


def test_a_plain_conversation_goes_on_and_says_at_its_end_what_is_lost(store):
    session = tiny_model().session(max_tokens=3)
    keeper = Keeper(store, session)
    with full(store):
        for text in ("one", LONG_TEXT[:100] + "two"):
            assert list(keeper.follow(session, session.send(text)))[-1].completion
        if keeper.held.problem is None:  # there may be room in pages that are there
            keeper.held.add(Message("user", LONG_TEXT))
            keeper.held.flush()
        assert "not stored" in keeper.close()
    assert keeper.close() == ""
    assert [m.content for m in store.messages(1)][:2] == ["one", session.nodes[1].content]


def test_the_chat_before_this_one_is_not_forgotten(store):
    first, second = tiny_model().session(max_tokens=2), tiny_model().session(max_tokens=2)
    keeper = Keeper(store, first)
    with held(store.path):
        list(keeper.follow(first, first.send("one")))
        list(keeper.follow(second, second.send("two")))  # /new or /load
        assert keeper.close(wait=0).count("2 messages are not stored") == 2
    assert keeper.close() == ""
    assert sorted(c.title for c in store.chats()) == ["one", "two"]


def tight(*args, home):
    """A command that may write no file of more than 32 KB: a log's index has that much."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (32_800, 32_800))

    return subprocess.run(
        [*TINYCHAT, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "TINYCHAT_HOME": str(home)},
        timeout=120,
    )


def test_one_answer_that_cannot_be_stored_is_printed_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    folder = tiny_folder(tmp_path / "model")
    first = tinychat("run", folder, "-c", "hello", *GREEDY)
    assert first.returncode == 0
    out = tight("run", folder, "-c", "hello again", *GREEDY, home=tmp_path)
    assert out.stdout.strip()
    assert out.returncode == 1
    assert "2 messages are not stored." in out.stderr
    assert "Traceback" not in out.stderr
    assert "Internal" not in out.stderr
    (chat,) = json.loads(tinychat("chats", "--json").stdout)
    assert chat["messages"] == 2


# The screen


@pytest.mark.asyncio
@pytest.mark.parametrize("cause", PROBLEMS)
async def test_the_screen_goes_on_and_stores_later(store, cause):
    app = make_app(store, Script(LONG_TEXT, 3), "second answer")
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        with PROBLEMS[cause](store):
            await say(pilot, "a question")
            await answered(pilot)
            await wait_until(pilot, lambda: "kept in memory" in " ".join(screen_text(app).split()))
            assert "not stored" in screen_text(app)
            await say(pilot, "another question")
            await answered(pilot, 2)
            assert "second answer" in screen_text(app)
            await pilot.press("ctrl+b")  # the list can be read, or says why not
            await pilot.press("ctrl+b")
            await pilot.press("ctrl+q")
            await wait_until(pilot, lambda: "Leave again to lose it" in screen_text(app))
            await say(pilot, f"/save {store.path.parent}/rescued.md")
            await wait_until(pilot, lambda: (store.path.parent / "rescued.md").exists())
        await wait_until(pilot, lambda: "The chat is stored again." in screen_text(app))
        await wait_until(pilot, lambda: "not stored" not in screen_text(app))
        assert [m.content for m in store.messages(1)] == [
            "a question", LONG_TEXT, "another question", "second answer",
        ]  # fmt: skip
        await pilot.press("ctrl+q")
    assert app.return_code == 0
    assert "another question" in (store.path.parent / "rescued.md").read_text()


@pytest.mark.asyncio
async def test_leaving_with_what_cannot_be_stored_takes_two_steps(store):
    app = make_app(store, Script(LONG_TEXT, 3))
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        with read_only(store):
            await say(pilot, "a question")
            await answered(pilot)
            await say(pilot, "/exit")
            await wait_until(pilot, lambda: "Leave again to lose it" in screen_text(app))
            assert app.is_running
            await say(pilot, "/exit")
            await wait_until(pilot, lambda: not app.is_running)
            assert "2 messages are not stored." in store.loss()


@pytest.mark.asyncio
async def test_lists_that_cannot_be_read_say_so(store, monkeypatch):
    def broken(*args):
        raise StoreError("failing", store.path, "disk I/O error")

    app = make_app(store)
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        monkeypatch.setattr(store._database, "read", broken)
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "Check the disk" in screen_text(app))
        await pilot.press("ctrl+b", "up")
        await say(pilot, "/undo")
        await wait_until(pilot, lambda: "Check the disk" in screen_text(app))
        await say(pilot, "hello")
        await answered(pilot)


def test_a_store_that_cannot_be_opened_says_why(tmp_path):
    path = tmp_path / "chats.db"
    ChatStore(path).close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(TinychatError, match=r"does not work"):
        ChatStore(tmp_path / "file" / "chats.db")
