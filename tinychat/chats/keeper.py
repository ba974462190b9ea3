"""A session whose conversation is kept in the chat store: for the plain REPL and for one-shot commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.chats.open_chat import OpenChat
from tinychat.session import Message

if TYPE_CHECKING:
    from tinychat.base.events import Event
    from tinychat.session import Session

SAVE_SECONDS = 0.7  # of an answer in the making, at most that much is not yet stored
WAIT = 30.0  # seconds that the end of the program waits for another program's lock
_SHARED = [f.name for f in fields(Message) if f.name != "parent"]


class Keeper:
    """Ties a session to a chat in the store. Send answers through `follow`; nothing is stored before the
    first.
    """

    def __init__(self, store: ChatStore, session: Session, chat: Chat | None = None):
        self.store = store
        self._attach(session, chat)
        if chat is not None:
            self._restore()

    def _attach(self, session: Session, chat: Chat | None = None) -> None:
        self.session = session
        self.held = OpenChat(self.store, chat or Chat(0, "", session.model.name, session.system))
        self._ids: list[int] = []  # of the session's messages, in the chat
        self._open: int | None = None  # the message that is being written
        self._said = False

    def _restore(self) -> None:
        session, chat, model = self.session, self.held.chat, self.session.model.name
        messages = list(self.held.by_id.values())
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
                text += getattr(event, "written", "")
                if session.nodes and (now := time.monotonic()) - saved >= SAVE_SECONDS:
                    saved = now
                    self.keep(session, text)
                yield event
        finally:
            events.close()  # now the session has what was said
            self.keep(session)

    def keep(self, session: Session, so_far: str = "") -> None:
        """Store what was said since the last time, and what the answer in the making has said so far. What
        cannot be stored now is stored later. Another session than before is another chat.
        """
        if session is not self.session:
            self.close(wait=0)
            self._attach(session)
        if not session.nodes:
            return
        self._said = True
        for node in session.nodes[len(self._ids) :]:
            parent = None if node.parent is None else self._ids[node.parent]
            if node.role == "user":
                m = self.held.add("user", node.content, parent, attachments=node.attachments)
            else:
                m = self.held.add(node.role, "", parent, session.model.name)
                self._open = len(self._ids)
            self._ids.append(m.id)
            self._finish()
        self._finish()
        if self._open is not None:
            m = self.held.by_id[self._ids[self._open]]
            m.content = so_far or m.content
            self.held.change(m)
        if session.leaf is not None:
            chat, leaf = self.held.chat, self._ids[session.leaf]
            if (chat.leaf, chat.system) != (leaf, session.system):
                chat.leaf, chat.system = leaf, session.system
                self.held.change()
        if self.held.problem is None:
            self.held.flush()

    def _finish(self) -> None:
        """Take over the open message, once it is whole."""
        if self._open is None or (node := self.session.nodes[self._open]).finish_reason is None:
            return
        m = self.held.by_id[self._ids[self._open]]
        for name in _SHARED:
            setattr(m, name, getattr(node, name))
        m.model = self.session.model.name
        self.held.change(m)
        self._open = None

    def close(self, wait: float = WAIT, say: Callable[[str], None] = lambda text: None) -> str:
        """Keep the KV cache for the next time, and let other programs have the chat; what could not be stored
        (nothing, if all could). Idempotent.

        wait: seconds to wait for another program's lock; `say` hears that this takes long.
        """
        if self.held.chat.id and self._said:
            with suppress(TinychatError):  # it only saves time; the conversation itself is safe
                if not self.store.in_memory:
                    self.session.save_kv(locations.kv_file(str(self.held.chat.id)))
        self._said = False
        self.held.close()
        until = time.monotonic() + wait
        while self.held.locked and time.monotonic() < until:
            say(f"{self.held.problem.what} Waiting for it, {wait:.0f} s at most.")
            say = _silence
            self.held.flush()
        return self.store.loss()


def _silence(text: str) -> None:
    """Say nothing."""
