"""Chats and messages as rows of the store, and back.

Whatever a damaged file has in a row, reading it gives a chat or a message that every other part can use: a
field that makes no sense is empty, a message without its parent goes on where the conversation was.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tinychat.base.characters import whole
from tinychat.base.sampling_params import SamplingParams
from tinychat.conversation import LATEST, Message, Tree, is_number, mend_parents

CHAT = "id, title, model, system, params, leaf, created, updated, deleted"
# In the order of the table's columns; those behind the first three are fields of a message.
MESSAGE = (
    "id, chat, parent, role, content, model, prompt_text, prompt_ids, ids, finish_reason, stats, created, "
    "attachments, tool_calls, tool_call_id, written"
)
FIELDS = tuple(MESSAGE.split(", ")[3:])


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


def tree_of(rows: Iterable[tuple], leaf: int | None = None) -> tuple[Tree, list[int]]:
    """A chat's messages from rows of MESSAGE in the order of their ids, and the number of each one's row.

    leaf: the row at the end of the present branch; its newest message, where that is none of them. A parent
    that is not there, or comes later, is replaced by the message after which this one makes sense.
    """
    rows = list(rows)
    nodes = [_message(row) for row in rows]
    numbers = [row[0] for row in rows]
    parents = [(row[0], row[2] if type(row[2]) is int else None) for row in rows]
    for m, parent in zip(nodes, mend_parents(parents, [m.role for m in nodes]), strict=True):
        m.parent = parent
    if leaf in numbers:
        return Tree(nodes, numbers.index(leaf)), numbers
    return Tree(nodes, len(nodes) - 1 if nodes else None), numbers


def _message(row: tuple) -> Message:
    """A message from a row of MESSAGE, of an older file too; its parent is not known yet."""
    return Message.mended(
        {name: _codec(name)[1](value) for name, value in zip(FIELDS, row[3:], strict=False)}
    )


def text_of(value: Any) -> str:
    """The text in a column, whatever type it has."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else whole(str(value))


def _time(value: Any) -> float:
    return float(value) if is_number(value) and 0 <= value <= LATEST else 0.0


def _json(value: Any) -> Any:
    try:
        return json.loads(text_of(value) or "null")
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    read = _json(value)
    return read if isinstance(read, dict) else {}


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


def _same(value: Any) -> Any:
    return value


def _text(value: str | None) -> str | None:
    return None if value is None else whole(value)


def _optional(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _list(value: list[Any]) -> str | None:
    return json.dumps(value, ensure_ascii=False) if value else None


def _json_list(value: Any) -> list[Any]:
    read = _json(value)
    return read if isinstance(read, list) else []


# How a field becomes a column, and what a column says of the field; text where nothing is said.
_CODECS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "model": (_text, _optional),
    "prompt_ids": (_pack, _unpack),
    "ids": (_pack, _unpack),
    "finish_reason": (_same, _optional),
    "stats": (json.dumps, _json),
    "created": (_same, _same),
    "attachments": (_list, _json_list),
    "tool_calls": (_list, _json_list),
}


def _codec(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return _CODECS.get(name, (_text, text_of))


# Writing


def insert_chat(db: sqlite3.Connection, chat: Chat) -> int:
    """A new row, under the chat's own number if it has one; the number."""
    values = (chat.id or None, *_chat_values(chat), chat.created, chat.updated, chat.deleted)
    cursor = db.execute(
        "INSERT INTO chats (id, title, model, system, params, leaf, created, updated, deleted) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    )
    return cursor.lastrowid or 0


def update_chat(db: sqlite3.Connection, chat: Chat) -> None:
    """The row of a chat as the chat is now; when it was deleted is not touched."""
    db.execute(
        "UPDATE chats SET title = ?, model = ?, system = ?, params = ?, leaf = ?, updated = ? WHERE id = ?",
        (*_chat_values(chat), chat.updated, chat.id),
    )


def _chat_values(chat: Chat) -> tuple:
    system = None if chat.system is None else whole(chat.system)
    return whole(chat.title), whole(chat.model), system, json.dumps(chat.params), chat.leaf


_INSERT = f"INSERT INTO messages (chat, parent, {', '.join(FIELDS)}) VALUES (?, ?{', ?' * len(FIELDS)})"
_UPDATE = f"UPDATE messages SET parent = ?, {', '.join(f'{f} = ?' for f in FIELDS)} WHERE id = ? AND chat = ?"


def put_message(
    db: sqlite3.Connection, chat: int, m: Message, row: int | None, parent: int | None, full_text: bool
) -> int:
    """A message as it is now, in its row or a new one (row None, or no longer there); the row's id.

    `parent` is the row of its parent. What is added to an answer is searchable once it is whole.
    """
    values = (parent, *(_codec(name)[0](getattr(m, name)) for name in FIELDS))
    if row is not None and not db.execute(_UPDATE, (*values, row, chat)).rowcount:
        row = None
    if row is None:
        row = db.execute(_INSERT, (chat, *values)).lastrowid or 0
    elif full_text and (m.role != "assistant" or m.finish_reason is not None):
        db.execute("DELETE FROM words WHERE rowid = ?", (row,))
    else:
        return row
    if full_text and m.content:
        db.execute("INSERT INTO words (rowid, content) VALUES (?, ?)", (row, whole(m.content)))
    return row
