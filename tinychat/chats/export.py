"""A stored chat in other forms: JSON that a session reads, Markdown that a person reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tinychat.chats.chat_store import Chat, ChatStore, StoredMessage, path_to
from tinychat.text.reasoning import split_thought


def to_json(store: ChatStore, chat_id: int, ensure_ascii: bool = False) -> str:
    """A stored chat's whole tree, as `tinychat.Session.load` and `/load` read it."""
    return json_of(*store.tree(chat_id), ensure_ascii)


def json_of(chat: Chat, messages: Sequence[StoredMessage], ensure_ascii: bool = False) -> str:
    """A conversation's whole tree, as `tinychat.Session.load` and `/load` read it."""
    index = {m.id: i for i, m in enumerate(messages)}
    nodes = [
        {
            "role": m.role,
            "content": m.content,
            "parent": None if m.parent is None else index[m.parent],
            "prompt_text": m.prompt_text,
            "prompt_ids": m.prompt_ids,
            "ids": m.ids,
            "finish_reason": m.finish_reason,
            "stats": m.stats,
            **({"attachments": m.attachments} if m.attachments else {}),
        }
        for m in messages
    ]
    content = {
        "tinychat_session": 1,
        "model": chat.model,
        "system": chat.system,
        "params": chat.params,
        "leaf": index.get(chat.leaf),
        "nodes": nodes,
    }
    return json.dumps(content, ensure_ascii=ensure_ascii, indent=1)


def to_markdown(store: ChatStore, chat_id: int) -> str:
    """The present branch of a stored chat, for reading."""
    chat, messages = store.tree(chat_id)
    return markdown_of(chat, path_to({m.id: m for m in messages}, chat.leaf))


def markdown_of(chat: Chat, path: Iterable[StoredMessage]) -> str:
    """A conversation for reading."""
    parts = [f"# {chat.title}", f"*{chat.model}*"]
    if chat.system:
        parts.append(f"**System**\n\n{chat.system}")
    for m in path:
        if m.role == "user":
            parts.append(f"**You**\n\n{m.as_read()}")
            continue
        reasoning, text, _ = split_thought(m.content, m.prompt_text)
        parts.append(f"**{m.model or 'Model'}**")
        if reasoning:
            parts.append(f"<details><summary>Reasoning</summary>\n\n{reasoning}\n\n</details>")
        parts.append(text)
    return "\n\n".join(parts) + "\n"
