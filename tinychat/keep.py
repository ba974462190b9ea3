"""A session whose conversation is kept in the chat store: for the plain REPL and for one-shot commands."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from tinychat import locations
from tinychat.errors import TinychatError
from tinychat.session import Message
from tinychat.store import Chat, ChatStore, StoredMessage

if TYPE_CHECKING:
    from tinychat.events import Event
    from tinychat.session import Session

SAVE_SECONDS = 0.7  # of an answer in the making, at most that much is not yet stored
_SHARED = [f.name for f in fields(Message) if f.name != "parent"]


class Keeper:
    """Ties a session to a chat in the store. Send answers through `follow`; nothing is stored before the
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
        self._open: int | None = None  # the message that is being written
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

    def follow(self, session: Session, events: Iterator[Event]) -> Iterator[Event]:
        """An answer's events as they are; what is said is stored as it comes, so that a program that is
        killed loses a second of it.
        """
        text, saved = "", 0.0
        try:
            for event in events:
                text += event.text
                if session.nodes and (now := time.monotonic()) - saved >= SAVE_SECONDS:
                    saved = now
                    self.keep(session)
                    if self._open is not None:
                        self.store.write_partial(self._ids[self._open], text)
                yield event
        finally:
            events.close()  # now the session has what was said
            self.keep(session)

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
                self._open = len(self._ids)
            self._ids.append(stored.id)
            self._finish()
        self._finish()
        if session.leaf is not None:
            self.store.update(self.chat.id, leaf=self._ids[session.leaf], system=session.system)

    def _finish(self) -> None:
        """Write the open message whole, once it is."""
        if self._open is None or (node := self.session.nodes[self._open]).finish_reason is None:
            return
        parent = None if node.parent is None else self._ids[node.parent]
        whole = {n: getattr(node, n) for n in _SHARED}
        self.store.finish(
            StoredMessage(self._ids[self._open], parent, model=self.session.model.name, **whole)
        )
        self._open = None

    def close(self) -> None:
        """Keep the KV cache for the next time, and let other programs have the chat. Idempotent."""
        if self._release is not None:
            if self.chat is not None and self._said:
                with suppress(TinychatError):  # it only saves time; the conversation itself is safe
                    self.session.save_kv(locations.kv_file(str(self.chat.id)))
            self._release()
            self._release = None
