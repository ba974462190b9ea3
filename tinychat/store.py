"""The chats that were held, in one SQLite file: trees of messages, searchable, written as they happen.

Loads nothing heavy: the chat screen imports it. Several processes may use one file at once (WAL); a chat is
written by one of them at a time (`ChatStore.lock`). Sessions of embedding programs never come here.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat import locations
from tinychat.characters import whole
from tinychat.errors import TinychatError

VERSION = 1
KEEP_DELETED = 7 * 86400.0  # seconds until a deleted chat is really gone
TITLE_LENGTH = 60
MARK, UNMARK = "\x02", "\x03"  # around what was found, in a Hit's excerpt

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chats (
    id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, model TEXT NOT NULL, system TEXT,
    params TEXT NOT NULL, leaf INTEGER, created REAL NOT NULL, updated REAL NOT NULL, deleted REAL);
CREATE INDEX IF NOT EXISTS chats_by_time ON chats (updated);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, chat INTEGER NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
    parent INTEGER, role TEXT NOT NULL, content TEXT NOT NULL, model TEXT,
    prompt_text TEXT NOT NULL DEFAULT '', prompt_ids BLOB, ids BLOB, finish_reason TEXT, stats TEXT,
    created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS messages_by_chat ON messages (chat);
"""
_FTS = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS words "
    "USING fts5(content, tokenize='unicode61 remove_diacritics 2', prefix='1 2')"
)


@dataclass
class Chat:
    """A conversation as the list shows it."""

    id: int
    title: str
    model: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    leaf: int | None = None
    created: float = 0.0
    updated: float = 0.0
    messages: int = 0


@dataclass
class StoredMessage:
    """A node of a chat's tree; the fields of `tinychat.session.Message`, with ids that hold across restarts.

    `model` is whose token ids these are. An answer without a finish_reason was being written when its program
    ended.
    """

    id: int
    parent: int | None
    role: str
    content: str
    model: str | None = None
    prompt_text: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class Hit:
    """A chat that a search found, and where: `excerpt` has MARK and UNMARK around the words."""

    chat: Chat
    excerpt: str


class ChatLockedError(TinychatError):
    """Another program has the chat open."""


class ChatStore:
    """All chats in `path` (default: `chats.db` in tinychat's home). Calls may come from any thread.

    A damaged file is set aside, never deleted, and `notice` says so. Raises TinychatError if the file cannot
    be opened or was made by a newer tinychat.
    """

    def __init__(self, path: Path | None = None, *, full_text: bool = True, in_memory: bool = False):
        """in_memory: nothing is written anywhere."""
        self.path = path or locations.home() / "chats.db"
        self.in_memory = in_memory
        self.notice = ""
        self._lock = threading.RLock()
        try:
            self._open(full_text)
        except sqlite3.OperationalError as e:  # locked, read-only, full: not the file's fault
            raise self._unusable(e) from e
        except sqlite3.DatabaseError:
            try:
                self._set_aside()
                self._open(full_text)
            except (sqlite3.Error, OSError) as e:
                raise self._unusable(e) from e
        except OSError as e:
            raise self._unusable(e) from e

    def _unusable(self, e: Exception) -> TinychatError:
        return TinychatError(
            f"The chats in {self.path} cannot be opened: {e}.",
            "Move the file away to start afresh, or set TINYCHAT_HOME to a folder of yours.",
        )

    def _set_aside(self) -> None:
        self._db.close()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{end}", f"{aside}{end}")
        self.notice = f"The stored chats were damaged and set aside as {aside}; a new store was begun."

    def _open(self, full_text: bool) -> None:
        if not self.in_memory:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))  # nobody else's business
        where = ":memory:" if self.in_memory else self.path
        self._db = sqlite3.connect(where, timeout=10, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise TinychatError(
                f"{self.path} was written by a newer tinychat.", "Update tinychat, or move the file away."
            )
        self.full_text = full_text
        if version < VERSION or not self._has_words():
            self._create(full_text)
        else:
            self.full_text = full_text and self._has_words()
        # Damage further in shows here, not in the middle of a chat. A large store is not read for it.
        if not self.in_memory and self.path.stat().st_size < 1 << 22:
            (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)

    def _has_words(self) -> bool:
        return bool(self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone())

    def _create(self, full_text: bool) -> None:
        self._db.executescript(_SCHEMA)
        if full_text:
            try:
                self._db.execute(_FTS)
                with self._write() as db:
                    db.execute(
                        "INSERT INTO words (rowid, content) SELECT id, content FROM messages "
                        "WHERE id NOT IN (SELECT rowid FROM words)"
                    )
            except sqlite3.OperationalError:
                self.full_text = False  # an SQLite built without FTS5: search reads the messages themselves
        self._db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _write(self):
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _read(self, sql: str, *args: Any) -> list[tuple]:
        with self._lock:
            return self._db.execute(sql, args).fetchall()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()

    # Chats

    def create(
        self, model: str, system: str | None = None, params: dict | None = None, title: str = ""
    ) -> Chat:
        """A new, empty chat."""
        now = time.time()
        model, title, system = whole(model), whole(title), system and whole(system)
        with self._write() as db:
            row = db.execute(
                "INSERT INTO chats (title, model, system, params, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (title, model, system, json.dumps(params or {}), now, now),
            )
            return Chat(row.lastrowid, title, model, system, dict(params or {}), None, now, now, 0)

    _CHAT = (
        "SELECT id, title, model, system, params, leaf, created, updated, "
        "(SELECT count(*) FROM messages WHERE chat = chats.id) FROM chats "
    )

    def chats(self, limit: int = 1000) -> list[Chat]:
        """Newest first; empty ones left out."""
        rows = self._read(
            self._CHAT + "WHERE deleted IS NULL AND leaf IS NOT NULL ORDER BY updated DESC, id DESC LIMIT ?",
            limit,
        )
        return [_chat(r) for r in rows]

    def chat(self, chat_id: int) -> Chat:
        """One chat. Raises TinychatError if there is none of that number."""
        rows = self._read(self._CHAT + "WHERE id = ? AND deleted IS NULL", chat_id)
        if not rows:
            raise TinychatError(f"There is no chat {chat_id}.", "tinychat chats lists them.")
        return _chat(rows[0])

    def latest(self) -> Chat | None:
        """The chat that was spoken in last."""
        return next(iter(self.chats(1)), None)

    def update(self, chat_id: int, **changes: Any) -> None:
        """Set title, model, system, params or leaf. None leaves `leaf` and `system` empty."""
        unknown = set(changes) - {"title", "model", "system", "params", "leaf"}
        if unknown:
            raise ValueError(f"unknown {unknown}")
        if "params" in changes:
            changes["params"] = json.dumps(changes["params"])
        changes = {k: whole(v) if isinstance(v, str) else v for k, v in changes.items()}
        names = ", ".join(f"{name} = ?" for name in changes)
        with self._write() as db:
            db.execute(f"UPDATE chats SET {names} WHERE id = ?", (*changes.values(), chat_id))

    def delete(self, chat_id: int) -> None:
        """Out of every list; `restore` brings it back until it is purged."""
        with self._write() as db:
            db.execute("UPDATE chats SET deleted = ? WHERE id = ?", (time.time(), chat_id))

    def restore(self, chat_id: int) -> None:
        """Undo a deletion."""
        with self._write() as db:
            db.execute("UPDATE chats SET deleted = NULL WHERE id = ?", (chat_id,))

    def purge(self, older_than: float = KEEP_DELETED) -> int:
        """Really remove what was deleted longer ago than that many seconds; how many chats."""
        before = time.time() - older_than
        gone = [r[0] for r in self._read("SELECT id FROM chats WHERE deleted < ?", before)]
        gone += [
            r[0]
            for r in self._read(
                "SELECT id FROM chats WHERE leaf IS NULL AND updated < ?", time.time() - 86400
            )
        ]
        for chat_id in gone:
            with self._write() as db:
                if self.full_text:
                    db.execute(
                        "DELETE FROM words WHERE rowid IN (SELECT id FROM messages WHERE chat = ?)",
                        (chat_id,),
                    )
                db.execute("DELETE FROM messages WHERE chat = ?", (chat_id,))
            if not self.in_memory:
                locations.kv_file(str(chat_id)).unlink(missing_ok=True)
                db.execute("DELETE FROM chats WHERE id = ?", (chat_id,))
        return len(gone)

    # Messages

    def messages(self, chat_id: int) -> list[StoredMessage]:
        """The whole tree, oldest first: a parent comes before its children."""
        rows = self._read(
            "SELECT id, parent, role, content, model, prompt_text, prompt_ids, ids, finish_reason, stats "
            "FROM messages WHERE chat = ? ORDER BY id",
            chat_id,
        )
        return [
            StoredMessage(*r[:6], _unpack(r[6]), _unpack(r[7]), r[8], json.loads(r[9] or "{}")) for r in rows
        ]

    def add(
        self, chat_id: int, role: str, content: str, parent: int | None, model: str | None = None, **rest: Any
    ) -> StoredMessage:
        """Append a message and make it the chat's present leaf. The first one names the chat."""
        content = whole(content)
        m = StoredMessage(0, parent, role, content, model and whole(model), **rest)
        now = time.time()
        with self._write() as db:
            row = db.execute(
                "INSERT INTO messages (chat, parent, role, content, model, prompt_text, prompt_ids, ids, "
                "finish_reason, stats, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (chat_id, parent, role, content, m.model, m.prompt_text, _pack(m.prompt_ids), _pack(m.ids),
                 m.finish_reason, json.dumps(m.stats), now),
            )  # fmt: skip
            m.id = row.lastrowid
            db.execute("UPDATE chats SET leaf = ?, updated = ? WHERE id = ?", (m.id, now, chat_id))
            if role == "user":
                db.execute(
                    "UPDATE chats SET title = ? WHERE id = ? AND title = ''", (make_title(content), chat_id)
                )
            if self.full_text and content:
                db.execute("INSERT INTO words (rowid, content) VALUES (?, ?)", (m.id, content))
        return m

    def write_partial(self, message_id: int, content: str) -> None:
        """What an answer has said so far. Cheap: not yet searchable."""
        with self._write() as db:
            db.execute("UPDATE messages SET content = ? WHERE id = ?", (whole(content), message_id))

    def finish(self, m: StoredMessage) -> None:
        """Write an answer whole and make it searchable."""
        now = time.time()
        m.content, m.model, m.prompt_text = whole(m.content), m.model and whole(m.model), whole(m.prompt_text)
        with self._write() as db:
            db.execute(
                "UPDATE messages SET content = ?, model = ?, prompt_text = ?, prompt_ids = ?, ids = ?, "
                "finish_reason = ?, stats = ? WHERE id = ?",
                (m.content, m.model, m.prompt_text, _pack(m.prompt_ids), _pack(m.ids), m.finish_reason,
                 json.dumps(m.stats), m.id),
            )  # fmt: skip
            db.execute(
                "UPDATE chats SET updated = ? WHERE id = (SELECT chat FROM messages WHERE id = ?)",
                (now, m.id),
            )
            if self.full_text:
                db.execute("DELETE FROM words WHERE rowid = ?", (m.id,))
                db.execute("INSERT INTO words (rowid, content) VALUES (?, ?)", (m.id, m.content))

    def said(self, limit: int = 200, longest: int = 4000) -> list[str]:
        """What the user said lately, newest first, each text once."""
        rows = self._read(
            "SELECT content FROM messages WHERE role = 'user' AND length(content) <= ? "
            "ORDER BY id DESC LIMIT ?",
            longest,
            limit,
        )
        return list(dict.fromkeys(r[0] for r in rows))

    # Finding

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """Chats whose title or messages have every word of `text` (the last one as a beginning), newest
        first. Without full-text search: messages that contain `text` itself.
        """
        text = whole(text)
        words = re.findall(r"\w+", text)
        if not words:
            return [Hit(c, "") for c in self.chats(limit)]
        found: dict[int, str] = {}
        likeness = "%" + re.sub(r"([\\%_])", r"\\\1", text.strip()) + "%"
        for row in self._read(
            "SELECT id FROM chats WHERE title LIKE ? ESCAPE '\\' AND deleted IS NULL", likeness
        ):
            found[row[0]] = ""
        if self.full_text:
            rows = self._read(
                "SELECT max(id), chat FROM words JOIN messages ON id = words.rowid WHERE words MATCH ? "
                "GROUP BY chat ORDER BY 1 DESC LIMIT ?",
                " ".join(f'"{w}"' for w in words) + "*",
                limit,
            )
        else:
            rows = self._read(
                "SELECT max(id), chat FROM messages WHERE content LIKE ? ESCAPE '\\' "
                "GROUP BY chat ORDER BY 1 DESC LIMIT ?",
                likeness,
                limit,
            )
        for message, chat_id in rows:
            ((content,),) = self._read("SELECT content FROM messages WHERE id = ?", message)
            found[chat_id] = _excerpt(content, words)
        if not found:
            return []
        marks = ",".join("?" * len(found))
        rows = self._read(
            self._CHAT + f"WHERE id IN ({marks}) AND deleted IS NULL AND leaf IS NOT NULL "
            "ORDER BY updated DESC, id DESC LIMIT ?",
            *found,
            limit,
        )
        return [Hit(c, found[c.id]) for c in map(_chat, rows)]

    # Two programs, one chat

    def lock(self, chat_id: int) -> Callable[[], None]:
        """Claim a chat for this process; call the result to let go. A process that dies lets go too.

        Raises ChatLockedError if another one has it.
        """
        import fcntl

        if self.in_memory:
            return lambda: None
        folder = self.path.parent / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"chat-{chat_id}", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise ChatLockedError(
                f"Chat {chat_id} is open in another terminal.", "Close it there, or start a new one."
            ) from None

        def release() -> None:
            nonlocal handle
            if handle >= 0:
                os.close(handle)
                handle = -1

        return release


def chosen(store: ChatStore, latest: bool, number: int | None) -> Chat | None:
    """The chat that `--continue` or `--resume N` mean; None for neither, or when there is none to
    continue.
    """
    if number is not None:
        return store.chat(number)
    return store.latest() if latest else None


def path_to(by_id: dict[int, StoredMessage], leaf: int | None) -> list[StoredMessage]:
    """Messages from the first one to `leaf`."""
    out: list[StoredMessage] = []
    while leaf is not None and leaf in by_id:
        out.append(by_id[leaf])
        leaf = by_id[leaf].parent
    return out[::-1]


def make_title(text: str) -> str:
    """The first words of what was asked, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def _chat(row: tuple) -> Chat:
    with suppress(ValueError):
        return Chat(*row[:4], json.loads(row[4]), *row[5:])
    return Chat(*row[:4], {}, *row[5:])


def _excerpt(content: str, words: list[str]) -> str:
    """Some of the text around the first of the words, marked."""
    match = re.search("|".join(rf"\b{re.escape(w)}" for w in words), content, re.IGNORECASE)
    start, end = match.span() if match else (0, 0)
    before, after = content[max(0, start - 30) : start], content[end : end + 60]
    parts = ["…" if start > 30 else "", before, MARK, content[start:end], UNMARK, after]
    return "".join(parts) + ("…" if len(content) > end + 60 else "")


def _pack(ids: list[int]) -> bytes:
    numbers = array("i", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(blob: bytes | None) -> list[int]:
    numbers = array("i")
    numbers.frombytes(blob or b"")
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
