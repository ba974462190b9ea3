"""A chat store of which parts are damaged: what can be read is saved, every field may be anything."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from fuzz.fuzz_store import damage_fields, do_everything, make_log, write_store
from stored import add
from tiny import tiny_model

from tinychat.chats import database
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.export import to_json
from tinychat.chats.keeper import Keeper
from tinychat.conversation import Tree
from tinychat.session import Session

PAGE = 4096


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "chats.db"
    write_store(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def model():
    with tiny_model() as m:
        yield m


def texts(path):
    """What all chats say, those that were deleted too; and what became of a damaged file."""
    store = ChatStore(path)
    for chat in store.deleted():
        store.restore(chat.id)
    out = {c.id: [m.content for m in store.messages(c.id)] for c in store.chats()}
    store.create("demo")  # writing finds what reading does not
    notice = store.notice
    store.close()
    return out, notice


def overwrite(data, start, end):
    data[start:end] = b"\xff" * (end - start)


DAMAGES = {
    "magic": lambda d: overwrite(d, 0, 16),
    "page size": lambda d: overwrite(d, 16, 18),
    "a format that is only read": lambda d: overwrite(d, 18, 19),
    "encoding": lambda d: overwrite(d, 56, 60),
    "version": lambda d: overwrite(d, 60, 64),
    "header": lambda d: overwrite(d, 0, 100),
    "schema": lambda d: overwrite(d, 100, PAGE),
    "roots": lambda d: overwrite(d, PAGE, 3 * PAGE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_chat_is_saved_where_only_the_way_to_it_is_lost(tmp_path, sound, damage):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    whole, _ = texts(path)
    data = bytearray(path.read_bytes())
    DAMAGES[damage](data)
    path.write_bytes(data)
    found, notice = texts(path)
    if damage == "roots":  # one of the pages had a few chats
        assert sum(map(len, found.values())) >= 0.8 * sum(map(len, whole.values()))
    else:
        assert found == whole
    assert "damaged-" in notice
    aside = [p for p in tmp_path.iterdir() if "damaged-" in p.name]
    assert len(aside) == 1
    assert aside[0].read_bytes() == data
    assert texts(path)[1] == ""


def test_what_lies_in_the_log_is_saved_too(tmp_path, sound):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    store = ChatStore(path)
    add(store, store.create("demo").id, "user", "only in the log", None)
    main, log = bytearray(path.read_bytes()), (tmp_path / "chats.db-wal").read_bytes()
    store.close()
    overwrite(main, 100, PAGE)
    path.write_bytes(main)
    (tmp_path / "chats.db-wal").write_bytes(log)
    assert ["only in the log"] in texts(path)[0].values()


def test_a_damaged_index_of_words_is_made_anew(tmp_path, sound):
    """SQLite opens it, and finds nothing that is said from then on."""
    path = tmp_path / "chats.db"
    path.write_bytes(sound.replace(b"'words_data'(id INTEGER PRIMARY", b"'words_data'(id INTEGER PRIM\xffRY"))
    do_everything(path)


def test_a_table_that_has_lost_its_numbers_is_read_by_page(tmp_path, sound):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    whole, _ = texts(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA writable_schema = ON")
        old, new = "id INTEGER PRIMARY KEY AUTOINCREMENT", "id INTEGER"
        changed = db.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = 'messages'", (old, new)
        )
        assert changed.rowcount == 1
    db.close()
    found, notice = texts(path)
    assert found == whole
    assert "damaged-" in notice


def test_a_deleted_chat_stays_deleted_when_its_file_is_mended(tmp_path, sound):
    path = tmp_path / "chats.db"
    path.write_bytes(b"\xff" * 16 + sound[16:])
    store = ChatStore(path)
    assert store.notice
    assert [c.id for c in store.deleted()] == [2]
    assert 2 not in [c.id for c in store.chats()]
    store.close()


@pytest.mark.parametrize("number", range(12))
def test_fields_that_make_no_sense_are_empty(tmp_path, sound, number):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    damage_fields(path, np.random.default_rng(number))
    do_everything(path)


@pytest.mark.parametrize("number", range(4))
def test_damage_in_a_large_file_is_met_where_it_is_read(tmp_path, sound, monkeypatch, number):
    monkeypatch.setattr(database, "CHECKED_WHOLE", 0)
    rng = np.random.default_rng(number)
    path = make_log(sound)(rng, tmp_path)
    do_everything(path)


def changed(path, sql, *values):
    db = sqlite3.connect(path)
    db.execute(sql, values)
    db.commit()
    db.close()


def test_a_cycle_of_parents_ends_and_the_conversation_stays_one(tmp_path, sound):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    changed(path, "UPDATE messages SET parent = id + 1 WHERE chat = 1 AND role = 'user'")
    changed(path, "UPDATE messages SET parent = id WHERE chat = 3")
    store = ChatStore(path)
    for chat in (1, 3):
        tree = store.messages(chat)
        assert all(m.parent is None or m.parent < i for i, m in enumerate(tree))
        assert len(Tree(tree).path(7)) == 8
    store.close()


def test_a_lost_parent_and_a_foreign_leaf_leave_the_conversation_whole(tmp_path, sound):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    changed(path, "DELETE FROM messages WHERE chat = 1 AND id = 4")
    changed(path, "UPDATE chats SET leaf = (SELECT max(id) FROM messages WHERE chat = 3) WHERE id = 1")
    store = ChatStore(path)
    _, tree, _ = store.tree(1)
    assert tree.leaf == len(tree.nodes) - 1
    assert tree.nodes[3].parent == 1  # the answer before the one that is gone
    store.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("params", "not json"),
        ("params", '{"temperature": 1e999, "top_k": 1.5, "unknown": 1, "seed": -1}'),
        ("ids", b"\x01\x02\x03"),
        ("ids", b"\xff\xff\xff\xff"),
        ("ids", (1 << 30).to_bytes(4, "little")),
        ("role", "system"),
        ("role", b"\xff"),
        ("stats", "[1, 2]"),
        ("stats", '{"prompt_tokens": "many", "decode_tps": NaN}'),
        ("stats", '{"prompt_tokens": 1%s}' % ("0" * 400)),
        ("finish_reason", "because"),
        ("content", b"caf\xe9"),
        ("created", "yesterday"),
        ("created", 1e300),
    ],
)
def test_a_chat_with_a_broken_field_is_exported_and_goes_on(tmp_path, sound, model, column, value):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    table, where = ("chats", "id") if column == "params" else ("messages", "chat")
    changed(path, f"UPDATE {table} SET {column} = ? WHERE {where} = 1", value)
    store = ChatStore(path)
    (tmp_path / "chat.json").write_text(to_json(store, 1))
    session = Session.load(tmp_path / "chat.json", model)
    assert len(session.nodes) == 9
    if column != "ids":  # the others never reach the engine
        return
    session = model.session(max_tokens=2)
    keeper = Keeper(store, session, store.chat(1))
    assert list(keeper.follow(session, session.send("more")))
    assert keeper.close() == ""
    store.close()


@pytest.mark.parametrize("number", [9223372036854775806, -9223372036854775808, -1])
def test_numbers_that_leave_no_room_for_others_are_replaced(tmp_path, sound, number):
    path = tmp_path / "chats.db"
    path.write_bytes(sound)
    changed(path, "UPDATE sqlite_sequence SET seq = 9223372036854775807")
    changed(path, "UPDATE chats SET id = ? WHERE id = 3", number)
    changed(path, "UPDATE messages SET chat = ? WHERE chat = 3", number)
    store = ChatStore(path)
    assert sorted(len(store.messages(c.id)) for c in store.chats()) == [9] * 5
    assert 0 < store.create("demo").id < 1000
    store.close()


def test_a_search_of_any_length_finds_or_finds_nothing(store):
    add(store, store.create("demo").id, "user", "a river", None)
    for text in ("river " * 5000, "r" * 100_000, "\ud800 river", "a AND (b", '"' * 300, "river*", "\0river"):
        store.search(text)
    assert len(store.search("river")) == 1
