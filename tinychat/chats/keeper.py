"""A session whose conversation is kept in the chat store: for the plain REPL and for one-shot commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message, Tree

if TYPE_CHECKING:
    from tinychat.base.events import Event

SAVE_SECONDS = 0.7  # of an answer in the making, at most that much is not yet stored
WAIT = 30.0  # seconds that the end of the program waits for another program's lock


class Keeper:
    """Ties a session (a server's too) to a chat in the store. Send answers through `follow`; nothing is
    stored before the first.
    """

    def __init__(self, store: ChatStore, session: Any, chat: Chat | None = None):
        self.store = store
        self._attach(session, chat)
        if chat is not None:
            self._restore()

    def _attach(self, session: Any, chat: Chat | None = None) -> None:
        self.session = session
        self.held = OpenChat(self.store, chat or Chat(0, "", session.model.name, session.system))
        self._kept: list[Message] = []  # the session's messages that the chat has, at the same places
        self._open: int | None = None  # the message that is being written
        self._said = False

    def _restore(self) -> None:
        session, chat, tree = self.session, self.held.chat, self.held.tree
        session.tree = Tree((m.for_model(session.model.name) for m in tree.nodes), tree.leaf)
        self._kept = list(session.nodes)
        session.load_kv(locations.kv_file(str(chat.id)))
        session.system = chat.system if session.system is None else session.system

    def open(self, session: Any, chat: Chat) -> None:
        """Go on with a stored chat in that session, which is empty. Raises ChatLockedError; then nothing
        changes.
        """
        held = OpenChat(self.store, chat)
        self.close(wait=0)
        self._attach(session)
        self.held = held
        self._restore()

    def change(self, session: Any) -> None:
        """Go on with the same chat in the session of another model, which is empty."""
        self.keep(self.session)
        name, tree = session.model.name, self.held.tree
        session.tree = Tree((m.for_model(name) for m in tree.nodes), tree.leaf)
        self.session, self._kept, self._open = session, list(session.nodes), None
        self.held.chat.model = name
        if session.nodes:
            self.held.change()
            self.held.flush()

    def follow(self, session: Any, events: Generator[Event, None, None]) -> Iterator[Event]:
        """An answer's events as they are; what is said is stored as it comes, so that a program that is
        killed loses a second of it.
        """
        text, saved = "", 0.0
        try:
            for event in events:
                text += getattr(event, "kept", "")
                if session.nodes and (now := time.monotonic()) - saved >= SAVE_SECONDS:
                    saved = now
                    self.keep(session, text)
                yield event
        finally:
            events.close()  # now the session has what was said
            self.keep(session)

    def keep(self, session: Any, so_far: str = "") -> None:
        """Store what was said since the last time, and what the answer in the making has said so far. What
        cannot be stored now is stored later. Another session than before is another chat.
        """
        if session is not self.session:
            self.close(wait=0)
            self._attach(session)
        self._take_back()
        if not session.nodes:
            return
        self._said = True
        self._reopen(so_far)
        for node in session.nodes[len(self._kept) :]:
            if node.role == "assistant":
                self._open = self.held.add(replace(node, model=session.model.name))
            else:
                self.held.add(replace(node))
            self._kept.append(node)
            self._finish()
        self._finish()
        if self._open is not None:
            m = self.held.tree.nodes[self._open]
            if so_far:  # behind what an answer that goes on had
                m.content = self.session.nodes[self._open].content + so_far
            self.held.change(self._open)
        chat, tree = self.held.chat, self.held.tree
        if session.leaf is not None and (tree.leaf, chat.system) != (session.leaf, session.system):
            tree.leaf, chat.system = session.leaf, session.system
            self.held.change()
        if self.held.problem is None:
            self.held.flush()

    def _take_back(self) -> None:
        """Follow the session where it took back a question whose answer failed before it began."""
        n, nodes = len(self._kept), self.session.nodes
        while n and (n > len(nodes) or nodes[n - 1] is not self._kept[n - 1]):
            n -= 1
        if n < len(self._kept):
            del self._kept[n:]
            self.held.forget(n)

    def _reopen(self, so_far: str) -> None:
        """Follow the session where its last answer goes on."""
        at = self.session.leaf
        if self._open is None and at is not None and at < len(self._kept):
            node, kept = self.session.nodes[at], self.held.tree.nodes[at]
            if node.role == "assistant" and (so_far or len(node.ids) > len(kept.ids)):
                self._open = at

    def _finish(self) -> None:
        """Take over the open message, once it is whole."""
        if self._open is None or (node := self.session.nodes[self._open]).finish_reason is None:
            return
        nodes = self.held.tree.nodes
        nodes[self._open] = replace(node, model=self.session.model.name, created=nodes[self._open].created)
        self.held.change(self._open)
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
            problem = self.held.problem
            say(f"{'' if problem is None else problem.what} Waiting for it, {wait:.0f} s at most.")
            say = _silence
            self.held.flush()
        return self.store.loss()


def _silence(text: str) -> None:
    """Say nothing."""
