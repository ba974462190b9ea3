"""Messages put into a store, as though a program had said them."""

from __future__ import annotations

import time

from tinychat.conversation import Message


def add(store, chat_id, role, content, parent=None, model=None, **rest):
    """Append a message behind the one in row `parent`, as the present leaf; its row."""
    chat = store.chat(chat_id)
    m = Message(role, content, None if parent is None else 0, model=model, created=time.time(), **rest)
    chat.title = chat.title or m.title()
    chat.updated = m.created
    rows = {} if parent is None else {0: parent}
    return store.write(chat, 1, {1: m}, rows, store.generation)[1][1]
