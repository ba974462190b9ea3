"""A session whose conversation is kept in the chat store: for the plain REPL and for one-shot commands."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from tinychat import locations
from tinychat.errors import TinychatError
from tinychat.session import Message
from tinychat.store import Chat, ChatStore, StoredMessage

if TYPE_CHECKING:
    from tinychat.session import Session

_SHARED = [f.name for f in fields(Message) if f.name != "parent"]


class Keeper:
    """Ties a session to a chat in the store. Call `keep` after each answer; nothing is stored before the
    first.
    """

    def __init__(self, store: ChatStore, session: Session, chat: Chat | None = None):
        self.store, self.chat = store, chat
        self._release = store.lock(chat.id) if chat else None
        self._attach(session)
        if chat is not None:
            self._restore(chat)

    def _attach(self, session: Session) -> None:
        self.session = session
        self._ids: list[int] = []  # of the session's messages, in the store
        self._said = False

    def _restore(self, chat: Chat) -> None:
        session, model = self.session, self.session.model.name
        messages = self.store.messages(chat.id)
        index = {m.id: i for i, m in enumerate(messages)}
        for m in messages:
            known = {name: getattr(m, name) for name in _SHARED}
            if m.model != model:  # another model's ids mean nothing to this one
                known |= {"ids": [], "prompt_ids": [], "prompt_text": ""}
            session.nodes.append(Message(parent=None if m.parent is None else index[m.parent], **known))
        self._ids = [m.id for m in messages]
        session.leaf = index.get(chat.leaf)
        session.load_kv(locations.kv_file(str(chat.id)))
        session.system = chat.system if session.system is None else session.system

    def keep(self, session: Session) -> None:
        """Store what was said since the last time. Another session than before is another chat."""
        if session is not self.session:
            self.close()
            self.chat = None
            self._attach(session)
        if not session.nodes:
            return
        self._said = True
        model = session.model.name
        if self.chat is None:
            self.chat = self.store.create(model, session.system)
            self._release = self.store.lock(self.chat.id)
        for node in session.nodes[len(self._ids) :]:
            parent = None if node.parent is None else self._ids[node.parent]
            if node.role == "user":
                stored = self.store.add(self.chat.id, "user", node.content, parent)
            else:
                stored = self.store.add(self.chat.id, node.role, "", parent, model)
                self.store.finish(
                    StoredMessage(stored.id, parent, model=model, **{n: getattr(node, n) for n in _SHARED})
                )
            self._ids.append(stored.id)
        if session.leaf is not None:
            self.store.update(self.chat.id, leaf=self._ids[session.leaf], system=session.system)

    def close(self) -> None:
        """Keep the KV cache for the next time, and let other programs have the chat. Idempotent."""
        if self._release is not None:
            if self.chat is not None and self._said:
                with suppress(TinychatError):  # it only saves time; the conversation itself is safe
                    self.session.save_kv(locations.kv_file(str(self.chat.id)))
            self._release()
            self._release = None
