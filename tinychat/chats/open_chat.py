"""A chat that is open in this program: its whole tree in memory, and what of it is not stored yet.

Nothing that is said waits for the disk. What cannot be stored now (the disk is full, the file is locked)
stays here, and a thread stores it as soon as that works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from tinychat.base.errors import TinychatError
from tinychat.chats.chat_store import Chat, ChatStore, StoreChangedError, StoreError
from tinychat.conversation import Message, Tree

PATIENCE = 0.25  # seconds that one attempt waits for another program's lock
AGAIN = 1.0  # seconds between two attempts
LONG = 3.0  # seconds after which a lock is worth a word: programs that write side by side take less


class OpenChat:
    """A chat, new or stored, claimed for this program once it is stored. Calls may come from any thread.

    Raises ChatLockedError if another program has it, and StoreError if it cannot be read.
    """

    def __init__(self, store: ChatStore, chat: Chat):
        self.store, self.chat = store, chat
        self.tree = Tree()
        self.problem: TinychatError | None = None  # why the last attempt failed
        self._rows: dict[int, int] = {}  # of stored messages, by their places in the tree
        self._changed: dict[int, None] = {}  # places of messages to be stored, in order
        self._chat_changed = False
        self._generation = store.generation
        self._failing_since = 0.0
        self._told = False
        self._noticed = store.notice
        self._lock = threading.RLock()  # of the fields here; never held while the disk is waited for
        self._writing = threading.Lock()
        self._retrying = False
        self._closed = False
        self._release: Callable[[], None] | None = None
        if chat.id:
            self._release = store.lock(chat.id)
            try:
                self.chat, self.tree, rows = store.tree(chat.id)
            except BaseException:
                self._release()
                raise
            self._rows = dict(enumerate(rows))

    # Saying something

    def add(self, m: Message) -> int:
        """Append a message and make it the present leaf; its place. The first one names the chat."""
        with self._lock:
            m.created = self.chat.updated = time.time()
            self.chat.created = self.chat.created or m.created
            at = self.tree.append(m)
            if m.role == "user" and not self.chat.title:
                self.chat.title = m.title()
            self.change(at)
        return at

    def forget(self, places: int) -> None:
        """Take back what was said in vain, but for that many messages. What is said next takes its place, in
        the store too.
        """
        with self._lock:
            leaf, nodes = self.tree.leaf, self.tree.nodes
            if leaf is not None and leaf >= places:
                self.tree.leaf = nodes[places].parent
            del nodes[places:]
            self.change()

    def change(self, at: int | None = None) -> None:
        """Say that a message, or the chat itself, is no longer what is stored. `flush` stores it."""
        with self._lock:
            if at is not None:
                self._changed[at] = None
            self._chat_changed = True

    # Storing it

    @property
    def unsaved(self) -> int:
        """How many messages are not stored as they are."""
        return len(self._changed)

    @property
    def locked(self) -> bool:
        """Whether another program's lock is the problem: that ends by itself."""
        return isinstance(self.problem, StoreError) and self.problem.cause == "locked"

    def flush(self, patience: float = PATIENCE) -> bool:
        """Store whatever is not; whether that worked (`problem` says why not, and it is tried again)."""
        with self._writing:
            while True:
                with self._lock:
                    generation = self.store.generation
                    if anew := generation != self._generation:  # the file is not the one that we wrote to
                        self._changed = dict.fromkeys(range(len(self.tree.nodes)))
                    changed, self._changed = self._changed, {}
                    if not self.tree.nodes or not (changed or self._chat_changed):
                        return True
                    self._chat_changed = False
                    chat, leaf, rows = replace(self.chat), self.tree.leaf, {} if anew else self._rows
                    messages = {i: replace(self.tree.nodes[i]) for i in changed if i < len(self.tree.nodes)}
                try:
                    number, rows = self.store.write(chat, leaf, messages, rows, generation, patience)
                except StoreChangedError:
                    self._give_back(changed)
                    continue
                except TinychatError as e:
                    self._failed(e, changed)
                    return False
                with self._lock:
                    self.chat.id, self._rows, self._generation = number, rows, generation
                    self.problem = None
                    self.store.unsaved.discard(self)
                if self._closed or number != chat.id:
                    self._let_go()
                if self._release is None and not self._closed:
                    with suppress(TinychatError):  # without it the chat is stored all the same
                        self._release = self.store.lock(number)
                return True

    def _give_back(self, changed: dict[int, None]) -> None:
        with self._lock:
            self._changed = changed | self._changed
            self._chat_changed = True

    def _failed(self, e: TinychatError, changed: dict[int, None]) -> None:
        self._give_back(changed)
        with self._lock:
            if self.problem is None:
                self._failing_since = time.monotonic()
            self.problem = e
            self.store.unsaved.add(self)
            if not self._retrying:
                self._retrying = True
                threading.Thread(target=self._retry, name="store", daemon=True).start()

    def _retry(self) -> None:
        while True:
            time.sleep(AGAIN)
            with self._lock:
                if self.problem is None:
                    self._retrying = False
                    return
            self.flush()

    def news(self) -> str:
        """News about storing since the last time: that it does not work, or works again."""
        with self._lock:
            e = self.problem
            if self._noticed != self.store.notice:
                self._noticed = self.store.notice
                return self._noticed
            if e is None:
                told, self._told = self._told, False
                return "The chat is stored again." if told else ""
            if self._told or (
                getattr(e, "cause", "") == "locked" and time.monotonic() - self._failing_since < LONG
            ):
                return ""
            self._told = True
        return f"{e.what} {e.todo} The chat is kept in memory until it can be stored."

    def loss(self) -> str:
        """Sentence that says what would be lost if the program ended now; else empty."""
        with self._lock:
            n, e = self.unsaved, self.problem
        if e is None or not n:
            return ""
        return f"{n} {'message is' if n == 1 else 'messages are'} not stored. {e.what} {e.todo}"

    def close(self) -> None:
        """Store what is left, and let other programs have the chat, now or once it is. Idempotent."""
        self._closed = True
        if self.flush():
            self._let_go()

    def _let_go(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None
