"""The chats that were held, in one SQLite file: trees of messages, searchable, written as they happen.

Loads nothing heavy: the chat screen imports it. Several processes may use one file at once (WAL); a chat is
written by one of them at a time (`ChatStore.lock`). Sessions of embedding programs never come here.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.base.characters import whole
from tinychat.base.errors import TinychatError
from tinychat.chats.database import Database, StoreError, translated
from tinychat.chats.finding import LONGEST_SEARCH, Finder, Piece, words_of
from tinychat.chats.records import (
    CHAT,
    MESSAGE,
    Chat,
    chat_of,
    insert_chat,
    put_message,
    text_of,
    tree_of,
    update_chat,
)
from tinychat.conversation import Message, Tree

__all__ = [
    "Chat",
    "ChatLockedError",
    "ChatStore",
    "Hit",
    "StoreChangedError",
    "StoreError",
]

KEEP_DELETED = 7 * 86400.0  # seconds until a deleted chat is really gone


@dataclass
class Hit:
    """A chat that a search found, and some of the first message that has the words; nothing of it where the
    title has them.
    """

    chat: Chat
    pieces: list[Piece]

    @property
    def excerpt(self) -> str:
        """The pieces as one text."""
        return "".join(text for text, _ in self.pieces)


class ChatLockedError(TinychatError):
    """Another program has the chat open."""


class StoreChangedError(Exception):
    """The file is another one than the caller wrote to: mended, deleted or replaced meanwhile."""


class ChatStore:
    """All chats in `path` (default: `chats.db` in tinychat's home). Calls may come from any thread.

    What can be read of a damaged file is saved, the file is set aside, never deleted, and `notice` says so.
    Every call raises StoreError when the disk is full, the file is locked, or the like (`StoreError.cause`).
    """

    def __init__(self, path: Path | None = None, *, full_text: bool = True, in_memory: bool = False):
        """in_memory: nothing is written anywhere."""
        self.path = path or locations.home() / "chats.db"
        self.in_memory = in_memory
        self._database = Database(None if in_memory else self.path, full_text)
        self.unsaved: set[Any] = set()  # chats that are open here and hold what could not be stored yet

    @property
    def notice(self) -> str:
        """Sentence that says what became of a damaged file; empty if there was none."""
        return self._database.notice

    @property
    def full_text(self) -> bool:
        """Whether there is an index of words."""
        return self._database.full_text

    @property
    def generation(self) -> int:
        """Another number when the file is another one than before: mended, deleted, replaced."""
        return self._database.generation

    @property
    def patience(self) -> float:
        """Seconds that a call waits for another program's lock."""
        return self._database.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._database.patience = seconds

    def loss(self) -> str:
        """Sentence that says what would be lost if the program ended now, once more tried; else empty."""
        return " ".join(chat.loss() for chat in list(self.unsaved) if not chat.flush())

    def close(self) -> None:
        """Idempotent."""
        self._database.close()

    # Chats

    def create(
        self, model: str, system: str | None = None, params: dict | None = None, title: str = ""
    ) -> Chat:
        """A new, empty chat."""
        now = time.time()
        chat = Chat(0, title, model, system, dict(params or {}), None, now, now)
        chat.id = self._database.change(lambda db: insert_chat(db, chat))
        return chat

    _CHAT = f"SELECT {CHAT}, (SELECT count(*) FROM messages WHERE chat = chats.id) AS n FROM chats "

    def chats(self, limit: int = 1000) -> list[Chat]:
        """Newest first; empty ones left out."""
        rows = self._database.read(
            self._CHAT + "WHERE deleted IS NULL AND n > 0 ORDER BY updated DESC, id DESC LIMIT ?", limit
        )
        return [chat_of(r) for r in rows]

    def chat(self, chat_id: int) -> Chat:
        """One chat. Raises TinychatError if there is none of that number."""
        rows = []
        if -(1 << 63) <= chat_id < 1 << 63:
            rows = self._database.read(self._CHAT + "WHERE id = ? AND deleted IS NULL", chat_id)
        if not rows:
            raise TinychatError(f"There is no chat {chat_id}.", "tinychat chats lists them.")
        return chat_of(rows[0])

    def latest(self) -> Chat | None:
        """The chat that was spoken in last."""
        return next(iter(self.chats(1)), None)

    def update(self, chat_id: int, **changes: Any) -> None:
        """Set title, model, system, params or leaf. None leaves `leaf` and `system` empty."""
        unknown = set(changes) - {"title", "model", "system", "params", "leaf"}
        if unknown:
            raise ValueError(f"unknown {unknown}")

        def work(db: Any) -> None:
            rows = db.execute(f"SELECT {CHAT} FROM chats WHERE id = ?", (chat_id,)).fetchall()
            for chat in map(chat_of, rows):
                vars(chat).update(changes)
                update_chat(db, chat)

        self._database.change(work)

    def delete(self, chat_id: int) -> None:
        """Out of every list; `restore` brings it back until it is purged."""
        self._set_deleted(chat_id, time.time())

    def deleted(self) -> list[Chat]:
        """Chats that can be brought back, deleted last first."""
        rows = self._database.read(
            self._CHAT + "WHERE deleted >= ? AND n > 0 ORDER BY deleted DESC, id DESC",
            time.time() - KEEP_DELETED,
        )
        return [chat_of(r) for r in rows]

    def restore(self, chat_id: int) -> None:
        """Undo a deletion."""
        self._set_deleted(chat_id, None)

    def _set_deleted(self, chat_id: int, when: float | None) -> None:
        sql = "UPDATE chats SET deleted = ? WHERE id = ?"
        self._database.change(lambda db: db.execute(sql, (when, chat_id)))

    def purge(self, older_than: float = KEEP_DELETED) -> int:
        """Really remove what was deleted longer ago than that many seconds, so that no file has a word of it;
        how many chats.

        A chat's row goes last, empty by then: where wiping fails, the next purge finds it and wipes again.
        """
        before = time.time() - older_than
        rows = self._database.read(
            "SELECT id FROM chats WHERE deleted < ? OR "
            "(updated < ? AND NOT EXISTS (SELECT 1 FROM messages WHERE chat = chats.id))",
            before,
            time.time() - 86400,
        )
        gone = [r[0] for r in rows]
        if not gone:
            return 0

        def remove(db: Any) -> None:
            for number in gone:
                self._remove_messages(db, number)
                db.execute("UPDATE chats SET title = '', model = '', system = NULL WHERE id = ?", (number,))

        self._database.change(remove)
        if not self.in_memory:
            with translated(self.path):
                for number in gone:
                    kv = locations.kv_file(str(number))
                    for path in (kv, kv.with_suffix(".damaged"), self._lock_file(number)):
                        path.unlink(missing_ok=True)
        self._database.wipe()
        rows = [(number,) for number in gone]
        self._database.change(lambda db: db.executemany("DELETE FROM chats WHERE id = ?", rows))
        return len(gone)

    def _remove_messages(self, db: Any, chat_id: int) -> None:
        if self.full_text:
            sql = "DELETE FROM words WHERE rowid IN (SELECT id FROM messages WHERE chat = ?)"
            db.execute(sql, (chat_id,))
        db.execute("DELETE FROM messages WHERE chat = ?", (chat_id,))

    # Messages

    def messages(self, chat_id: int) -> list[Message]:
        """The whole tree, oldest first: a parent comes before its children."""
        return self._read_tree(chat_id, None)[0].nodes

    def tree(self, chat_id: int) -> tuple[Chat, Tree, list[int]]:
        """A chat and all its messages, and the number of each one's row."""
        chat = self.chat(chat_id)
        return chat, *self._read_tree(chat_id, chat.leaf)

    def _read_tree(self, chat_id: int, leaf: int | None) -> tuple[Tree, list[int]]:
        sql = f"SELECT {MESSAGE} FROM messages WHERE chat = ? ORDER BY id"
        return tree_of(self._database.read(sql, chat_id), leaf)

    def write(
        self,
        chat: Chat,
        leaf: int | None,
        messages: Mapping[int, Message],
        rows: Mapping[int, int],
        generation: int,
        patience: float | None = None,
    ) -> tuple[int, dict[int, int]]:
        """Store a chat and those of its messages that are new or changed, all of it or nothing; the number of
        the chat (a new one if it has none) and the rows of its messages.

        messages: by their places in the tree, of which `leaf` is one. rows: where messages that were stored
        before are, by their places; the others are new, parents first. If there are none, `messages` is the
        whole chat, and replaces what is stored of it. Raises StoreChangedError if the store's `generation` is
        another one than that.
        """

        def work(db: Any) -> tuple[int, dict[int, int]]:
            if generation != self.generation:
                raise StoreChangedError
            now, number = dict(rows), chat.id
            there = db.execute("SELECT created FROM chats WHERE id = ?", (number,)).fetchone()
            if there is not None and not rows:
                if there[0] == chat.created:
                    self._remove_messages(db, number)
                else:  # another chat, of a file that was put in the place of ours
                    number = 0
            if not number or there is None:
                number = insert_chat(db, replace(chat, id=number, leaf=None))
            for at, m in messages.items():
                parent = None if m.parent is None else now[m.parent]
                now[at] = put_message(db, number, m, now.get(at), parent, self.full_text)
            update_chat(db, replace(chat, id=number, leaf=None if leaf is None else now[leaf]))
            return number, now

        return self._database.change(work, patience)

    def said(self, limit: int = 200, longest: int = 4000) -> list[str]:
        """Texts that the user said lately, newest first, each once."""
        rows = self._database.read(
            "SELECT messages.content FROM messages JOIN chats ON chats.id = chat "
            "WHERE role = 'user' AND deleted IS NULL AND length(content) <= ? "
            "ORDER BY messages.id DESC LIMIT ?",
            longest,
            limit,
        )
        return list(dict.fromkeys(text for r in rows if (text := text_of(r[0]))))

    # Finding

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """Chats whose title or messages have every word of `text` (the last one as a beginning), newest
        first. Without full-text search: messages that contain `text` itself.
        """
        text = whole(text[:LONGEST_SEARCH])
        words = words_of(text)
        if not words:
            return [Hit(c, []) for c in self.chats(limit)]
        found: dict[int, int | None] = {}
        likeness = "%" + re.sub(r"([\\%_])", r"\\\1", text.strip()) + "%"
        for row in self._database.read(
            "SELECT id FROM chats WHERE title LIKE ? ESCAPE '\\' AND deleted IS NULL "
            "ORDER BY updated DESC, id DESC LIMIT ?",
            likeness,
            limit,
        ):
            found[row[0]] = None
        if self.full_text:
            rows = self._database.read(
                "SELECT max(id), chat, min(id) FROM words JOIN messages ON id = words.rowid "
                "WHERE words MATCH ? GROUP BY chat ORDER BY 1 DESC LIMIT ?",
                " ".join(f'"{w}"' for w in words) + "*",
                limit,
            )
        else:
            rows = self._database.read(
                "SELECT max(id), chat, min(id) FROM messages WHERE content LIKE ? ESCAPE '\\' "
                "GROUP BY chat ORDER BY 1 DESC LIMIT ?",
                likeness,
                limit,
            )
        found |= {chat: first for _, chat, first in rows}
        marks = ",".join("?" * len(found))
        rows = self._database.read(
            self._CHAT + f"WHERE id IN ({marks}) AND deleted IS NULL AND n > 0 "
            "ORDER BY updated DESC, id DESC LIMIT ?",
            *found,
            limit,
        )
        finder = self.finder(text)
        return [Hit(c, self._excerpt(found[c.id], finder)) for c in map(chat_of, rows)]

    def finder(self, text: str) -> Finder:
        """What finds in a message what `search` finds."""
        return Finder.of(whole(text), self.full_text)

    def _excerpt(self, message: int | None, finder: Finder) -> list[Piece]:
        if message is None:  # the title has it
            return []
        rows = self._database.read("SELECT content FROM messages WHERE id = ?", message)
        return finder.excerpt(text_of(rows[0][0])) if rows else []

    # Two programs, one chat

    def _lock_file(self, chat_id: int) -> Path:
        return self.path.parent / "locks" / f"chat-{chat_id}"

    def lock(self, chat_id: int) -> Callable[[], None]:
        """Claim a chat for this process; call the result to let go. A process that dies lets go too.

        Raises ChatLockedError if another one has it.
        """
        if self.in_memory:
            return lambda: None
        path = self._lock_file(chat_id)
        try:
            with translated(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        except StoreError as e:
            if e.cause in ("full", "read-only"):  # no other program can write there either
                return lambda: None
            raise
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
