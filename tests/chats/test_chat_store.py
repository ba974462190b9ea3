from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stored
from stored import add

from tinychat.base.errors import TinychatError
from tinychat.chats.chat_store import ChatLockedError, ChatStore, chosen
from tinychat.chats.export import to_json, to_markdown
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message


def talk(store, *texts, model="demo"):
    chat = store.create(model)
    parent = None
    for i, text in enumerate(texts):
        parent = add(store, chat.id, "assistant" if i % 2 else "user", text, parent, model)
    return store.chat(chat.id)


def test_a_chat_survives_with_its_tree_and_its_token_ids(store, tmp_path):
    chat = store.create("demo", "Be brief.", {"temperature": 0.2})
    question = Message("user", "What is this?\nSecond line")
    first = Message("assistant", "One.", 0, "<u>", [1, 2, 3], [5, 70000], "stop", {"decode_tps": 3.5})
    second = Message("assistant", "Two.", 0, finish_reason="length")
    held = OpenChat(store, chat)
    for m in (question, first, second):
        m.model = "demo" if m.role == "assistant" else None
        held.add(m)
    assert held.flush()
    held.close()
    store.close()

    again = ChatStore(tmp_path / "chats.db")
    read, tree, rows = again.tree(chat.id)
    assert (read.title, read.system, read.params) == (
        "What is this? Second line",
        "Be brief.",
        {"temperature": 0.2},
    )
    assert (tree.leaf, read.leaf) == (2, rows[2])
    assert tree.nodes == again.messages(chat.id) == [question, first, second]
    again.close()


def test_a_partial_answer_is_there_after_the_program_was_killed(tmp_path):
    code = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from tinychat.chats.chat_store import Chat, ChatStore\n"
        "from tinychat.chats.open_chat import OpenChat\n"
        "from tinychat.conversation import Message\n"
        "held = OpenChat(ChatStore(Path(sys.argv[1])), Chat(0, '', 'demo'))\n"
        "q = held.add(Message('user', 'q')); a = held.add(Message('assistant', '', q, model='demo'))\n"
        "held.flush(); held.tree.nodes[a].content = 'so far'; held.change(a); held.flush()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "chats.db")]).returncode == -9
    store = ChatStore(tmp_path / "chats.db")
    answer = store.messages(1)[1]
    assert (answer.content, answer.finish_reason) == ("so far", None)
    store.lock(1)()  # the dead hold nothing


def test_two_programs_write_side_by_side_and_do_not_share_a_chat(store, tmp_path):
    chat = talk(store, "mine")
    release = store.lock(chat.id)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from stored import add\n"
        "from tinychat.chats.chat_store import ChatStore, ChatLockedError\n"
        "s = ChatStore(Path(sys.argv[1]))\n"
        "try:\n    s.lock(1)\nexcept ChatLockedError:\n    print('locked')\n"
        "c = s.create('demo'); parent = None\n"
        "for i in range(200):\n    parent = add(s, c.id, 'user', f'their {i}', parent)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(stored.__file__).parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(store.path)], stdout=subprocess.PIPE, text=True, env=env
    )
    parent = chat.leaf
    for i in range(200):
        parent = add(store, chat.id, "user", f"ours {i}", parent)
    assert other.communicate(timeout=60)[0] == "locked\n"
    assert other.returncode == 0
    assert len(store.messages(1)) == 201
    assert len(store.messages(2)) == 200
    release()
    store.lock(1)()


def test_a_program_that_ends_leaves_the_log_to_those_that_go_on(store):
    """Closing a file gives up every lock of its process: nobody but SQLite may open the store's."""
    talk(store, "before")
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1])\n"
        "print([title for (title,) in db.execute('SELECT title FROM chats ORDER BY id')])"
    )
    for title in ("after", "later", "at last"):
        said = subprocess.run(
            [sys.executable, "-c", code, str(store.path)], check=True, capture_output=True, text=True
        ).stdout
        assert said == f"{[c.title for c in reversed(store.chats())]}\n"
        ChatStore(store.path).close()  # as the screen does to wipe
        talk(store, title)


def test_a_chat_cannot_be_opened_twice_in_one_program_either(store):
    chat = talk(store, "hi")
    release = store.lock(chat.id)
    with pytest.raises(ChatLockedError):
        store.lock(chat.id)
    release()
    release()


@pytest.mark.parametrize("full_text", [True, False])
def test_search_finds_words_in_titles_and_messages(tmp_path, full_text):
    store = ChatStore(tmp_path / "x.db", full_text=full_text)
    assert store.full_text is full_text
    foxes_say = "A fox is a small animal that lives in a den of its own"
    foxes = talk(store, "Tell me about foxes", foxes_say)
    talk(store, "Tell me about rivers", "Rivers run 100 % of the time")
    assert [h.chat.id for h in store.search("small animal")] == [foxes.id]
    assert store.search("small animal")[0].excerpt == foxes_say
    assert ("small", True) in store.search("small")[0].pieces
    assert [h.chat.id for h in store.search("FOXES")] == [foxes.id]
    assert len(store.search("tell me")) == 2
    assert len(store.search("")) == 2
    assert store.search("nothing of the kind") == []
    for odd in ('"', "'; DROP TABLE chats; --", "* OR", "%", "_", "\\", "a\0b", "NEAR(", "-"):
        store.search(odd)


@pytest.mark.parametrize("full_text", [True, False])
def test_a_chat_full_of_a_word_does_not_hide_the_others(tmp_path, full_text):
    store = ChatStore(tmp_path / "x.db", full_text=full_text)
    first = talk(store, "a river")
    talk(store, *["river"] * 50)
    assert [h.chat.id for h in store.search("river", 5)] == [2, first.id]


def test_a_deleted_chat_is_out_of_every_list_until_undone_and_purged_later(store):
    a, b = talk(store, "first one"), talk(store, "second one")
    store.delete(b.id)
    assert [c.id for c in store.chats()] == [a.id]
    assert [h.chat.id for h in store.search("one")] == [a.id]
    with pytest.raises(TinychatError, match="no chat"):
        store.chat(b.id)
    store.restore(b.id)
    assert len(store.search("one")) == 2
    store.delete(b.id)
    assert store.purge() == 0
    assert store.purge(older_than=-1) == 1
    assert store.messages(b.id) == []
    assert [h.chat.id for h in store.search("second")] == []


def test_export_reads_well_and_loads_again(store, tmp_path):
    from tiny import tiny_model

    from tinychat.session import Session

    chat = talk(store, "Hi", "Hello!", "More?", "Yes.")
    text = to_markdown(store, chat.id)
    assert text.index("Hi") < text.index("Hello!") < text.index("More?")
    path = tmp_path / "chat.json"
    path.write_text(to_json(store, chat.id))
    session = Session.load(path, tiny_model())
    assert [m["content"] for m in session.messages] == ["Hi", "Hello!", "More?", "Yes."]


def test_what_was_said_is_the_input_history(store):
    talk(store, "one", "answer", "two", "answer", "one")
    assert store.said() == ["one", "two"]


@pytest.mark.parametrize("damage", ["garbage", "middle"])
def test_a_damaged_file_is_set_aside_and_the_program_goes_on(tmp_path, damage):
    path = tmp_path / "chats.db"
    before = b"not a database at all" * 100
    if damage == "middle":
        old = ChatStore(path)
        talk(old, *(f"message {i} " * 40 for i in range(40)))
        old.close()
        before = bytearray(path.read_bytes())
        before[4096 * 2 : 4096 * 6] = b"\xff" * 4096 * 4
    path.write_bytes(before)
    store = ChatStore(path)
    (aside,) = (p for p in tmp_path.iterdir() if "damaged" in p.name)
    assert aside.read_bytes() == before
    assert str(aside) in store.notice
    talk(store, "hello", "hi")
    assert len(store.search("hello")) == 1
    assert ChatStore(path).notice == ""


def test_a_store_in_memory_writes_nothing(tmp_path):
    store = ChatStore(tmp_path / "chats.db", in_memory=True)
    talk(store, "secret", "well")
    store.lock(1)()
    assert len(store.search("secret")) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_newer_file_is_left_alone(store, tmp_path):
    store._database._db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(TinychatError, match="newer"):
        ChatStore(tmp_path / "chats.db")


def test_the_file_is_nobody_elses_business(store):
    assert store.path.stat().st_mode & 0o077 == 0


def test_continue_means_the_chat_spoken_in_last(store):
    assert chosen(store, True, None) is None
    a, b = talk(store, "a"), talk(store, "b")
    assert chosen(store, True, None).id == b.id
    add(store, a.id, "user", "again", a.leaf)
    assert chosen(store, True, None).id == a.id
    assert chosen(store, False, b.id).id == b.id
    assert chosen(store, False, None) is None
    with pytest.raises(TinychatError, match="no chat 77"):
        chosen(store, False, 77)


def test_titles_are_one_short_line():
    assert Message("user", "a\n  b").title() == "a b"
    assert len(Message("user", "word " * 100).title()) <= 60


def test_a_thousand_chats_list_and_search_fast(tmp_path):
    store = ChatStore(tmp_path / "big.db")
    rows, n = [], 0
    now = time.time()
    for c in range(1000):
        for i in range(20):
            n += 1
            role = "assistant" if i % 2 else "user"
            text = f"chat {c} message {i} about the {'river' if c % 7 else 'fox'} " + "and so on " * 30
            rows.append((n, c + 1, n - 1 if i else None, role, text, now))

    def fill(db):
        db.executemany(
            "INSERT INTO chats (id, title, model, params, leaf, created, updated) "
            "VALUES (?, ?, 'm', '{}', ?, ?, ?)",
            [(c + 1, f"title {c}", (c + 1) * 20, now, now + c) for c in range(1000)],
        )
        db.executemany(
            "INSERT INTO messages (id, chat, parent, role, content, created) VALUES (?, ?, ?, ?, ?, ?)", rows
        )
        db.execute("INSERT INTO words (rowid, content) SELECT id, content FROM messages")

    store._database.change(fill)
    best = {}
    for name, call in {
        "list": lambda: store.chats(300),
        "rare": lambda: store.search("message 19 about fox"),
        "common": lambda: store.search("and so on"),
        "one letter": lambda: store.search("a"),
    }.items():
        times = []
        for _ in range(3):
            began = time.thread_time()
            assert call()
            times.append(time.thread_time() - began)
        best[name] = min(times)
    print(best)
    assert max(best.values()) < 0.1, best


def test_json_of_a_listing_is_plain(store):
    talk(store, "Grüße 👋")
    assert json.loads(to_json(store, 1))["nodes"][0]["content"] == "Grüße 👋"
