"""Files that go with a message: beside what was said, in the session, the store, exports and commands."""

from __future__ import annotations

import json
import sqlite3

import pytest
from cli_helpers import GREEDY, tinychat
from stored import add
from tiny import tiny_folder, tiny_model

from tinychat.base.errors import UsageError
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.export import to_json, to_markdown
from tinychat.chats.keeper import Keeper
from tinychat.session import Session
from tinychat.text.attachments import as_read

FILE = {"name": "notes.md", "text": "glaciers\n```\ncode\n```\n"}
READ = "notes.md:\n````\nglaciers\n```\ncode\n```\n````\n\nwhat?"


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=512) as m:
        yield m


def test_the_model_reads_files_in_fences_that_hold_then_the_question():
    assert as_read("what?", [FILE]) == READ
    assert as_read("  ", [FILE]) == READ.removesuffix("\n\nwhat?")
    assert as_read("what?", []) == "what?"


def test_a_session_sends_edits_and_keeps_them(model, tmp_path):
    session = model.session(temperature=0, max_tokens=2)
    plain = model.session(temperature=0, max_tokens=2)
    list(session.send("what?", attachments=[FILE]))
    list(plain.send(READ))
    assert session.nodes[1].prompt_ids == plain.nodes[1].prompt_ids
    assert (session.nodes[0].content, session.nodes[0].attachments) == ("what?", [FILE])
    list(session.edit(0, "why?"))
    assert session.nodes[2].as_read() == READ.replace("what", "why")
    list(session.edit(0, "why?", attachments=[]))
    assert session.nodes[4].as_read() == "why?"
    list(session.edit(0, "", attachments=[FILE]))
    session.save(tmp_path / "s.json")
    assert Session.load(tmp_path / "s.json", model).nodes == session.nodes
    for bad in ([{"name": "x"}], [{"name": "x", "text": 1}], ["x"]):
        with pytest.raises(UsageError, match="attachments"):
            session.send("x", attachments=bad)
    with pytest.raises(UsageError, match="empty"):
        session.send("")


def test_the_store_keeps_them_beside_the_question_which_names_the_chat(model, tmp_path):
    store = ChatStore(tmp_path / "chats.db")
    session = model.session(temperature=0, max_tokens=2)
    keeper = Keeper(store, session)
    list(keeper.follow(session, session.send("what of it?", attachments=[FILE])))
    keeper.close()
    (chat,) = store.chats()
    assert chat.title == "what of it?"
    assert store.search("what")
    assert not store.search("glaciers")
    m = store.messages(chat.id)[0]
    assert (m.content, m.attachments) == ("what of it?", [FILE])
    assert READ.removesuffix("what?") in to_markdown(store, chat.id)
    assert json.loads(to_json(store, chat.id))["nodes"][0]["attachments"] == [FILE]
    (tmp_path / "e.json").write_text(to_json(store, chat.id))
    assert Session.load(tmp_path / "e.json", model).nodes[0].attachments == [FILE]

    again = model.session(temperature=0, max_tokens=2)
    Keeper(store, again, chat).close()
    assert [n.as_read() for n in again.nodes] == [n.as_read() for n in session.nodes]
    add(store, store.create("demo").id, "user", "", attachments=[FILE])
    assert store.chats()[0].title == "notes.md"
    store.close()


def test_an_older_store_opens_and_takes_them(tmp_path):
    path = tmp_path / "chats.db"
    store = ChatStore(path)
    add(store, store.create("demo").id, "user", "before")
    store.close()
    with sqlite3.connect(path) as db:  # as the version before had it
        for column in ("attachments", "tool_calls", "tool_call_id", "written"):
            db.execute(f"ALTER TABLE messages DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 2")
    db.close()
    store = ChatStore(path)
    assert not store.notice
    chat = store.chats()[0]
    after = add(store, chat.id, "user", "after", chat.leaf, attachments=[FILE])
    assert [(n.content, n.attachments) for n in store.messages(chat.id)] == [
        ("before", []),
        ("after", [FILE]),
    ]
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE messages SET attachments = '[{\"name\": 1}]' WHERE id = ?", (after,))
    db.close()
    store = ChatStore(path)
    assert store.messages(chat.id)[1].attachments == []
    store.close()


def test_a_file_of_the_command_line_is_an_attachment_of_the_chat_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    folder = tiny_folder(tmp_path / "tiny")
    (tmp_path / "notes.md").write_text(FILE["text"])
    out = tinychat("run", folder, "-c", "what?", "-f", tmp_path / "notes.md", *GREEDY, "--json")
    assert out.returncode == 0, out.stderr
    spelled = tinychat("run", folder, READ, *GREEDY, "--json")
    one, other = json.loads(out.stdout), json.loads(spelled.stdout)
    assert one["stats"]["prompt_tokens"] == other["stats"]["prompt_tokens"]
    assert one["text"] == other["text"]
    store = ChatStore(tmp_path / "home" / "chats.db")
    question = store.messages(1)[0]
    assert (question.content, [a["name"] for a in question.attachments]) == ("what?", ["notes.md"])
    store.close()
