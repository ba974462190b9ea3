"""Damaged chat stores: whatever is wrong with file or field, it opens, lists, exports and goes on."""

from __future__ import annotations

import json
import sqlite3
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzz.harness import Case, first_seed, minutes, run
from stored import add

from tinychat.base.errors import TinychatError
from tinychat.chats import database, records
from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.chats.export import to_json, to_markdown
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message

PAGE = 4096
JUNK = (
    None, 0, -1, 1, 2, 1 << 31, (1 << 63) - 1, -(1 << 63), 0.5, -1e300, 1e300, "", "x", "\0", "user",
    "system", "{", "[]", "[" * 5000, '{"temperature": 1e999}', '{"temperature": "hot", "who": 1}', "9" * 6000,
    '{"prompt_tokens": "x", "decode_tps": null, "generated_tokens": [1]}', b"", b"\x01\x02", b"\xff" * 401,
    b"\xff" * 400, "y" * 200_000, '"; DROP', "\x1b]0;t\x07", "NaN", "-Infinity", True,
)  # fmt: skip
COLUMNS = {
    "chats": records.CHAT.split(", "),
    "messages": records.MESSAGE.split(", "),
    "words": ["content"],
    "sqlite_sequence": ["name", "seq"],
}


def write_store(path: Path) -> None:
    """Six chats with branches and a long message, one of them deleted."""
    store = ChatStore(path)
    for c in range(6):
        chat = store.create("demo", "Be brief.", {"temperature": 0.5})
        parent = None
        for i in range(8):
            text = f"chat {c} message {i} about rivers " + "and so on " * (1500 if i == 5 else 20)
            whole = {"ids": [1, 2, 3] * 20, "prompt_ids": [4] * 10, "stats": {"prompt_tokens": 3}}
            rest = whole | {"finish_reason": "stop"} if i % 2 else {}
            parent = add(store, chat.id, ("user", "assistant")[i % 2], text, parent, "demo", **rest)
        add(store, chat.id, "assistant", "a branch", parent - 1, "demo", finish_reason="cancelled")
    store.delete(2)
    store.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "chats.db"
    write_store(path)
    return path.read_bytes()


def damage_bytes(data: bytearray, rng: np.random.Generator) -> None:
    """One of what disks and programs do to files."""
    at, pages = int(rng.integers(len(data))), len(data) // PAGE
    kind = rng.integers(8)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[int(rng.integers(100))] = int(rng.integers(256))
    elif kind == 2:
        for i in rng.integers(len(data), size=rng.integers(2, 50)):
            data[i] = int(rng.integers(256))
    elif kind == 3:
        n = min(int(rng.integers(1, 3 * PAGE)), len(data) - at)
        data[at : at + n] = bytes(n)
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        start = at // PAGE * PAGE
        data[start : start + PAGE] = rng.bytes(PAGE)
    elif kind == 6:
        a, b = (int(x) * PAGE for x in rng.integers(pages, size=2))
        data[a : a + PAGE], data[b : b + PAGE] = data[b : b + PAGE], data[a : a + PAGE]
    else:
        for i in rng.integers(100, PAGE, size=3):  # the schema
            data[i] = int(rng.integers(256))


def damage_fields(path: Path, rng: np.random.Generator) -> None:
    """Some fields are something else; what the schema forbids stays."""
    db = sqlite3.connect(path)
    for _ in range(int(rng.integers(1, 6))):
        table = list(COLUMNS)[rng.integers(len(COLUMNS))]
        column = COLUMNS[table][rng.integers(len(COLUMNS[table]))]
        value = JUNK[rng.integers(len(JUNK))]
        which = ("rowid % 7 = 3", "rowid = 5", "1", "rowid = 1")[rng.integers(4)]
        as_text = "CAST(? AS TEXT)" if isinstance(value, bytes) and rng.integers(2) else "?"
        with suppress(sqlite3.Error):
            db.execute(f"UPDATE {table} SET {column} = {as_text} WHERE {which}", (value,))
        if not rng.integers(6):
            with suppress(sqlite3.Error):
                db.execute("UPDATE messages SET parent = id + 1 - 2 * (id % 2)")  # cycles
        if not rng.integers(8):
            what = ("TABLE words", "INDEX messages_by_chat", "TABLE chats", "TABLE messages")[rng.integers(4)]
            with suppress(sqlite3.Error):
                db.execute(f"DROP {what}")
    db.commit()
    db.close()


def make_bytes(sound: bytes):
    def make(rng: np.random.Generator, folder: Path) -> Path:
        data, path = bytearray(sound), folder / "chats.db"
        damage_bytes(data, rng)
        path.write_bytes(data)
        return path

    return make


def make_fields(sound: bytes):
    def make(rng: np.random.Generator, folder: Path) -> Path:
        path = folder / "chats.db"
        path.write_bytes(sound)
        damage_fields(path, rng)
        return path

    return make


def make_log(sound: bytes):
    """A file whose program was killed: the last changes lie in its log."""

    def make(rng: np.random.Generator, folder: Path) -> Path:
        path, log = folder / "chats.db", folder / "chats.db-wal"
        path.write_bytes(sound)
        store = ChatStore(path)
        for _ in range(3):
            add(store, store.create("demo").id, "user", "in the log " * 50, None)
        kept = log.read_bytes()
        store.close()
        path.write_bytes(sound)
        for part in (path, log)[int(rng.integers(2)) :]:
            data = bytearray(kept if part == log else sound)
            damage_bytes(data, rng)
            part.write_bytes(data)
        if not log.exists():
            log.write_bytes(kept)
        return path

    return make


def use(path: Path) -> None:
    """A store is never refused, but for a number of its format that a newer tinychat may write."""
    try:
        do_everything(path)
    except TinychatError as e:
        if "newer tinychat" in e.what:
            raise
        raise AssertionError(str(e)) from e


def use_unchecked(path: Path) -> None:
    """As a file of many megabytes: damage shows where it is read."""
    database.CHECKED_WHOLE = 0
    use(path)


def do_everything(path: Path) -> None:
    """All that the program does with a store; what is said then is found again."""
    store = ChatStore(path)
    for chat in store.chats():
        to_markdown(store, chat.id)
        nodes = json.loads(to_json(store, chat.id))["nodes"]
        assert all(n["parent"] is None or n["parent"] < i for i, n in enumerate(nodes))
    for text in ("rivers", "mess", "chat 3", ""):
        store.search(text)
    store.said()
    for chat in store.deleted():
        store.restore(chat.id)
    for chat in (store.latest(), None):
        held = OpenChat(store, chat or Chat(0, "", "demo"))
        question = held.add(Message("user", "a new question", held.tree.leaf))
        held.add(Message("assistant", "a new answer", question, finish_reason="stop", model="demo"))
        assert held.flush(), held.problem
        held.close()
        assert "a new answer" in to_markdown(store, held.chat.id)
        assert held.chat.id in [h.chat.id for h in store.search("a new answer", 1000)]
    store.delete(held.chat.id)
    assert store.purge(-1)
    store.close()
    assert not ChatStore(path).notice  # once is enough


@pytest.mark.slow
def test_damaged_stores(sound):
    cases = {
        "bytes": Case(make_bytes(sound), use),
        "bytes of a large file": Case(make_bytes(sound), use_unchecked),
        "fields": Case(make_fields(sound), use),
        "fields of a large file": Case(make_fields(sound), use_unchecked),
        "log": Case(make_log(sound), use),
    }
    report = run(cases, first_seed(), minutes())
    print(report)
    assert not report.faults, str(report)
