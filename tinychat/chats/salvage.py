"""Chats that a damaged store still holds, read page by page from its file and its log.

SQLite itself reads such a file up to the damage at best. Rows lie whole in the leaves of its b-trees, so each
page is looked at by itself: what is a leaf of a table gives its rows, and how many columns they have says of
which table (the format: sqlite.org/fileformat2.html). Pages that are known to be free are left out, and of a
row that is there twice the page in use wins.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinychat.chats.records import (
    CHAT,
    MESSAGE,
    chat_of,
    insert_chat,
    put_message,
    tree_of,
)

PAGE = 4096  # SQLite's own choice, and so ours
LEAF = 13
COLUMNS = {"chats": (9, len(CHAT.split(","))), "messages": (12, len(MESSAGE.split(",")))}  # of version 1, now
LARGEST = 1 << 31  # of a chat's numbers that are kept
MOST = 1 << 62  # a larger number was not counted


def save(path: Path, db: sqlite3.Connection, full_text: bool) -> tuple[int, int]:
    """Write what can be read of the damaged file at `path` into an empty store; chats and messages saved.

    Chats keep their numbers where these can be. Raises sqlite3.Error and OSError for the new store only.
    """
    found = _by_page(path)
    for table, rows in _by_sqlite(path).items():
        found[table] |= rows
    trees: dict[int, list[tuple]] = {}
    for _, row in sorted(found["messages"].items()):
        if type(row[1]) is int:
            trees.setdefault(row[1], []).append(row)
    chats = {number: chat_of(row) for number, row in found["chats"].items()}
    saved = 0
    db.execute("BEGIN IMMEDIATE")
    for number in sorted(trees, key=lambda n: (not 0 < n < LARGEST, n)):  # new numbers after those that stay
        chat = chats.get(number) or chat_of((number, "", "", *[None] * 6))
        tree, _ = tree_of(trees[number], chat.leaf)
        if number not in chats:
            chat.created = chat.updated = tree.nodes[-1].created
        chat.title = chat.title or tree.nodes[0].title()
        chat.model = chat.model or next((m.model for m in reversed(tree.nodes) if m.model), "")
        chat.id = number if 0 < number < LARGEST else 0
        chat.id = insert_chat(db, chat)
        now: list[int] = []
        for m in tree.nodes:
            parent = None if m.parent is None else now[m.parent]
            now.append(put_message(db, chat.id, m, None, parent, full_text))
            saved += 1
        leaf = None if tree.leaf is None else now[tree.leaf]
        db.execute("UPDATE chats SET leaf = ? WHERE id = ?", (leaf, chat.id))
    db.execute("COMMIT")
    return len(trees), saved


def _by_sqlite(path: Path) -> dict[str, dict[int, tuple]]:
    """The rows of each table that SQLite can read to its end."""
    out: dict[str, dict[int, tuple]] = {}
    for table, columns in (("chats", CHAT), ("messages", MESSAGE)):
        with suppress(sqlite3.Error, OverflowError, MemoryError, UnicodeDecodeError):
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            try:
                db.text_factory = lambda data: data.decode("utf-8", "replace")
                have = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
                # An older version has fewer columns.
                names = ", ".join(c if c in have else "NULL" for c in columns.split(", "))
                found = db.execute(f"SELECT {names} FROM {table} NOT INDEXED")
                out[table] = {row[0]: row for row in found if type(row[0]) is int}
            finally:
                db.close()
    return out


def _by_page(path: Path) -> dict[str, dict[int, tuple]]:
    """Every row of every page that still looks like a leaf of a table."""
    out: dict[str, dict[int, tuple]] = {"chats": {}, "messages": {}}
    with _Pages(path) as pages:
        free = pages.free()
        for number in pages.numbers():
            if number in free:
                continue
            for row_id, row in pages.rows(number):
                for table, (least, most) in COLUMNS.items():
                    if least <= len(row) <= most and 0 < row_id < MOST and _is_likely(table, row):
                        out[table][row_id] = (row_id, *row[1:], *[None] * (most - len(row)))
    return out


def _is_likely(table: str, row: tuple) -> bool:
    if row[0] is not None:  # the number is kept beside the row
        return False
    if table == "chats":
        return isinstance(row[1], str) and isinstance(row[2], str)
    return type(row[1]) is int and isinstance(row[3], str) and isinstance(row[4], str)


class _Pages:
    """The pages of a database file, each as its log has it last."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        head = self.file.read(100)
        size = int.from_bytes(head[16:18], "big")
        self.size = size if size in (512, 1024, 2048, 8192, 16384, 32768) else PAGE
        length = path.stat().st_size
        if length % self.size and length % PAGE == 0:
            self.size = PAGE
        self.count = -(-length // self.size)
        self.logged: dict[int, bytes] = {}
        with suppress(OSError, struct.error):
            self._read_log(path.with_name(f"{path.name}-wal"))

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read_log(self, path: Path) -> None:
        """The frames of whole transactions since the log began anew."""
        with path.open("rb") as log:
            head = log.read(32)
            salts, waiting = head[16:24], {}
            while len(frame := log.read(24 + self.size)) == 24 + self.size and frame[8:16] == salts:
                number, committed = struct.unpack(">II", frame[:8])
                waiting[number] = frame[24:]
                if committed:
                    self.logged |= waiting
                    waiting = {}

    def numbers(self) -> Iterator[int]:
        """From the first page to the last."""
        last = max((self.count, *(n for n in self.logged if n < self.count + (1 << 20))))
        return iter(range(1, last + 1))

    def page(self, number: int) -> bytes:
        """The bytes of a page; none if there is none of that number."""
        if (logged := self.logged.get(number)) is not None:
            return logged
        if not 0 < number <= self.count:
            return b""
        self.file.seek((number - 1) * self.size)
        return self.file.read(self.size)

    def free(self) -> set[int]:
        """Pages on the list of free ones, as far as it can be followed."""
        out: set[int] = set()
        trunk = int.from_bytes(self.page(1)[32:36], "big")
        while 0 < trunk <= self.count and trunk not in out:
            out.add(trunk)
            page = self.page(trunk)
            trunk, n = int.from_bytes(page[:4], "big"), int.from_bytes(page[4:8], "big")
            n = min(n, self.size // 4 - 2)
            out.update(struct.unpack(f">{n}I", page[8 : 8 + 4 * n].ljust(4 * n, b"\0")))
        return out

    def rows(self, number: int) -> Iterator[tuple[int, tuple]]:
        """Id and columns of each row in a leaf of a table; nothing for any other page."""
        page = self.page(number)
        start = 100 if number == 1 else 0
        if len(page) < start + 8 or page[start] != LEAF:
            return
        n = int.from_bytes(page[start + 3 : start + 5], "big")
        for at in range(start + 8, min(start + 8 + 2 * n, len(page) - 1), 2):
            cell = int.from_bytes(page[at : at + 2], "big")
            with suppress(IndexError, ValueError, struct.error):
                length, cell = _varint(page, cell)
                row_id, cell = _varint(page, cell)
                if length < self.size * (self.count + len(self.logged) + 1):
                    yield row_id, _columns(self._payload(page, cell, length))

    def _payload(self, page: bytes, at: int, length: int) -> bytes:
        """A row's bytes: the beginning lies in its leaf, a long one goes on in a chain of other pages."""
        most, least = self.size - 35, (self.size - 12) * 32 // 255 - 23
        if length <= most:
            return page[at : at + length]
        here = least + (length - least) % (self.size - 4)
        here = here if here <= most else least
        parts, have = [page[at : at + here]], here
        following = int.from_bytes(page[at + here : at + here + 4], "big")
        while have < length and len(more := self.page(following)) == self.size:
            parts.append(more[4:])
            have += self.size - 4
            following = int.from_bytes(more[:4], "big")
        return b"".join(parts)[:length]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    return value << 8 | data[at + 8], at + 9


def _columns(payload: bytes) -> tuple[Any, ...]:
    """The columns of a record. One whose end is missing is as long as what is there."""
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
        if len(kinds) > 100:
            raise ValueError
    out: list[Any] = []
    at = end
    for kind in kinds:
        size = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)[kind] if kind < 10 else (kind - 12) // 2
        if size < 0:
            raise ValueError
        data = payload[at : at + size]
        at += size
        if kind == 0:
            out.append(None)
        elif kind in (8, 9):
            out.append(kind - 8)
        elif kind == 7:
            out.append(struct.unpack(">d", data)[0])
        elif kind < 7:
            out.append(int.from_bytes(data, "big", signed=True))
        else:
            out.append(data if kind % 2 == 0 else data.decode("utf-8", "replace"))
    return tuple(out)
