"""Chats and messages as rows of the store, and back.

Whatever a damaged file has in a row, reading it gives a chat or a message that every other part can use: a
field that makes no sense is empty, a message without its parent goes on where the conversation was.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tinychat.base.characters import whole
from tinychat.base.sampling_params import SamplingParams
from tinychat.text.attachments import are_sound, as_read

TITLE_LENGTH = 60
LATEST = 4102444800.0  # the year 2100: what a clock may say at most
CHAT = "id, title, model, system, params, leaf, created, updated, deleted"
MESSAGE = (
    "id, chat, parent, role, content, model, prompt_text, prompt_ids, ids, finish_reason, stats, created, "
    "attachments"
)
REASONS = ("stop", "length", "cancelled", "context_full", "error")


@dataclass
class Chat:
    """A conversation as the list shows it. `deleted`: when it was, in seconds since 1970."""

    id: int
    title: str
    model: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    leaf: int | None = None
    created: float = 0.0
    updated: float = 0.0
    deleted: float | None = None
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
    created: float = 0.0
    attachments: list[dict[str, str]] = field(default_factory=list)

    def as_read(self) -> str:
        """What the model reads: the files, then what was said."""
        return as_read(self.content, self.attachments) if self.attachments else self.content


def make_title(text: str) -> str:
    """The first words of what was asked, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


# Reading


def chat_of(row: tuple) -> Chat:
    """A chat from a row of CHAT, and the number of its messages if that follows."""
    number, title, model, system, params, leaf, created, updated, deleted, *count = row
    return Chat(
        number,
        text_of(title),
        text_of(model),
        None if system is None else text_of(system),
        SamplingParams.sound(_object(params)),
        leaf if type(leaf) is int else None,
        _time(created),
        _time(updated),
        None if deleted is None else _time(deleted),
        *count,
    )


def tree_of(rows: Iterable[tuple]) -> list[StoredMessage]:
    """A chat's messages from rows of MESSAGE in the order of their ids: a parent comes before its children.

    A parent that is not there, or comes later, is replaced by the message after which this one makes sense.
    """
    out: list[StoredMessage] = []
    known: set[int] = set()
    for row in rows:
        m = _message(row)
        if m.parent is not None and m.parent not in known:
            m.parent = next((n.id for n in reversed(out) if n.role != m.role), None)
        out.append(m)
        known.add(m.id)
    return out


def leaf_of(chat: Chat, messages: list[StoredMessage]) -> int | None:
    """The end of the present branch: the chat's own, or its newest message where that is none of its."""
    if any(m.id == chat.leaf for m in messages):
        return chat.leaf
    return messages[-1].id if messages else None


def _message(row: tuple) -> StoredMessage:
    number, _, parent, role, content, model, prompt_text, prompt_ids, ids, reason, stats, created = row[:12]
    model = None if model is None else text_of(model)
    ids, prompt_ids = _unpack(ids), _unpack(prompt_ids)
    if role not in ("user", "assistant"):
        role = "assistant" if model or ids or reason is not None else "user"
    if reason is not None and reason not in REASONS:
        reason = "error"
    return StoredMessage(
        number,
        None if parent is None or type(parent) is not int else parent,
        role,
        text_of(content),
        model,
        text_of(prompt_text),
        prompt_ids,
        ids,
        reason,
        {k: v for k, v in _object(stats).items() if _is_number(v)},
        _time(created),
        _attachments(row[12]) if len(row) > 12 else [],
    )


def text_of(value: Any) -> str:
    """The text in a column, whatever type it has."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else whole(str(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63  # which NaN and infinity are not


def _time(value: Any) -> float:
    return float(value) if _is_number(value) and 0 <= value <= LATEST else 0.0


def _object(value: Any) -> dict[str, Any]:
    try:
        read = json.loads(text_of(value) or "{}")
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _attachments(value: Any) -> list[dict[str, str]]:
    try:
        read = json.loads(text_of(value) or "[]")
    except (ValueError, RecursionError):
        return []
    return read if are_sound(read) else []


def _pack(ids: list[int]) -> bytes:
    numbers = array("i", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(blob: Any) -> list[int]:
    """Token ids; none of them where one cannot be right."""
    if not isinstance(blob, bytes) or len(blob) % 4:
        return []
    numbers = array("i")
    numbers.frombytes(blob)
    if sys.byteorder == "big":
        numbers.byteswap()
    return [] if numbers and min(numbers) < 0 else numbers.tolist()


# Writing


def insert_chat(db: sqlite3.Connection, chat: Chat) -> int:
    """A new row, under the chat's own number if it has one; the number."""
    values = (chat.id or None, *_chat_values(chat), chat.created, chat.updated, chat.deleted)
    return db.execute(
        "INSERT INTO chats (id, title, model, system, params, leaf, created, updated, deleted) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    ).lastrowid


def update_chat(db: sqlite3.Connection, chat: Chat) -> None:
    """The row of a chat as the chat is now; when it was deleted is not touched."""
    db.execute(
        "UPDATE chats SET title = ?, model = ?, system = ?, params = ?, leaf = ?, updated = ? WHERE id = ?",
        (*_chat_values(chat), chat.updated, chat.id),
    )


def _chat_values(chat: Chat) -> tuple:
    system = None if chat.system is None else whole(chat.system)
    return whole(chat.title), whole(chat.model), system, json.dumps(chat.params), chat.leaf


def put_message(
    db: sqlite3.Connection, chat: int, m: StoredMessage, row: int | None, parent: int | None, full_text: bool
) -> int:
    """A message as it is now, in its row or a new one (row None, or no longer there); the row's id.

    `parent` is the row of its parent. What is added to an answer is searchable once it is whole.
    """
    values = (
        parent, m.role, whole(m.content), None if m.model is None else whole(m.model), whole(m.prompt_text),
        _pack(m.prompt_ids), _pack(m.ids), m.finish_reason, json.dumps(m.stats),
        json.dumps(m.attachments, ensure_ascii=False) if m.attachments else None,
    )  # fmt: skip
    if row is not None:
        changed = db.execute(
            "UPDATE messages SET parent = ?, role = ?, content = ?, model = ?, prompt_text = ?, "
            "prompt_ids = ?, ids = ?, finish_reason = ?, stats = ?, attachments = ? "
            "WHERE id = ? AND chat = ?",
            (*values, row, chat),
        ).rowcount
        row = row if changed else None
    if row is None:
        row = db.execute(
            "INSERT INTO messages (chat, parent, role, content, model, prompt_text, prompt_ids, ids, "
            "finish_reason, stats, attachments, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (chat, *values, m.created),
        ).lastrowid
    elif full_text and (m.role == "user" or m.finish_reason is not None):
        db.execute("DELETE FROM words WHERE rowid = ?", (row,))
    else:
        return row
    if full_text and m.content:
        db.execute("INSERT INTO words (rowid, content) VALUES (?, ?)", (row, whole(m.content)))
    return row
