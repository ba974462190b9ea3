"""A stored chat in other forms: JSON that a session reads, Markdown that a person reads."""

from __future__ import annotations

import html
import json

from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.conversation import Tree
from tinychat.text.attachments import fence_of
from tinychat.text.reasoning import split_thought


def to_json(store: ChatStore, chat_id: int, ensure_ascii: bool = False) -> str:
    """A stored chat's whole tree, as `tinychat.Session.load` and `/load` read it."""
    chat, tree, _ = store.tree(chat_id)
    return json_of(chat, tree, ensure_ascii)


def json_of(chat: Chat, tree: Tree, ensure_ascii: bool = False) -> str:
    """A conversation's whole tree, as `tinychat.Session.load` and `/load` read it."""
    known = Tree((m.for_model(chat.model) for m in tree.nodes), tree.leaf)
    content = known.as_dict(chat.model, chat.system, chat.params)
    return json.dumps(content, ensure_ascii=ensure_ascii, indent=1)


def to_markdown(store: ChatStore, chat_id: int) -> str:
    """The present branch of a stored chat, for reading."""
    chat, tree, _ = store.tree(chat_id)
    return markdown_of(chat, tree)


def markdown_of(chat: Chat, tree: Tree) -> str:
    """A conversation for reading."""
    parts = [f"# {chat.title}", f"*{chat.model}*"]
    if chat.system:
        parts.append(f"**System**\n\n{chat.system}")
    for m in tree.messages():
        if m.role == "user":
            parts.append(f"**You**\n\n{m.as_read()}")
            continue
        if m.role == "tool":
            parts.append(_folded("Result", m.content))
            continue
        reasoning, text, _ = split_thought(m.content, m.prompt_text)
        parts.append(f"**{m.model or 'Model'}**")
        if reasoning:
            parts.append(f"<details><summary>Reasoning</summary>\n\n{reasoning}\n\n</details>")
        if text or not m.tool_calls:
            parts.append(text)
        for call in m.tool_calls:
            parts.append(_folded(f"Call of {call['function']['name']}", call["function"]["arguments"]))
    return "\n\n".join(parts) + "\n"


def _folded(title: str, text: str) -> str:
    """A text in a block of its own, which nothing in it ends."""
    fence = fence_of(text)
    return f"<details><summary>{html.escape(title)}</summary>\n\n{fence}\n{text}\n{fence}\n\n</details>"
