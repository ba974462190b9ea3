"""A conversation on the screen's side: the stored tree, the answer that is being written, and what the
engine is told about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message, Tree

SAVE_SECONDS = 0.7  # of an answer in the making, at most that much is not yet stored

_writer = ThreadPoolExecutor(1, thread_name_prefix="store")


class Conversation:
    """A chat that is open. Nothing is stored before the first message, and nothing waits for the disk."""

    def __init__(self, store: ChatStore, model: str, system: str | None = None, params: dict | None = None):
        self._hold(OpenChat(store, Chat(0, "", model, system, dict(params or {}))))

    @classmethod
    def open(cls, store: ChatStore, chat_id: int) -> Conversation:
        """A stored chat, claimed for this program. Raises ChatLockedError, TinychatError."""
        self = cls.__new__(cls)
        self._hold(OpenChat(store, store.chat(chat_id)))
        return self

    def _hold(self, held: OpenChat) -> None:
        self.held, self.store = held, held.store
        self.answer: int | None = None  # the place of the one that is being written
        self._saved = 0.0

    def close(self) -> None:
        """Let other programs have it, once it is stored. Idempotent."""
        self.held.close()

    @property
    def chat(self) -> Chat:
        """Chat as the list of chats shows it."""
        return self.held.chat

    @property
    def tree(self) -> Tree:
        """Everything that was said."""
        return self.held.tree

    @property
    def key(self) -> str:
        """Key by which the engine knows this conversation; a number once it is stored."""
        return str(self.chat.id or "new")

    # The tree

    def path(self) -> list[Message]:
        """The present branch."""
        return self.tree.messages()

    def switch(self, node: int) -> None:
        """Make the branch through that message the present one, down to its newest end."""
        self.tree.switch(node)
        self.keep()

    def last(self, role: str) -> Message | None:
        """The newest message of that role on the present branch."""
        at = self.tree.last(role)
        return None if at is None else self.tree.nodes[at]

    def tokens_used(self, leaf: int | None = None) -> int:
        """Tokens that the branch to a message (default: the present one) took when it was last answered."""
        for m in reversed(self.path() if leaf is None else self.tree.messages(leaf)):
            if m.stats:
                return m.stats.get("prompt_tokens", 0) + m.stats.get("generated_tokens", 0)
        return 0

    # Saying something

    def ask(self, text: str, parent: int | None, attachments: Sequence[dict[str, str]] = ()) -> int:
        """Add what the user says, and the files that go with it; returns its place."""
        at = self.held.add(Message("user", text, parent, attachments=list(attachments)))
        self.keep(at)
        return at

    def begin_branch(self, messages: Sequence[Message]) -> None:
        """Add messages as a branch that begins with the chat itself, and go there."""
        at = None
        for m in messages:
            m.parent = at
            at = self.held.add(m)
        self.keep(at)

    def begin_answer(self, question: int, model: str) -> int:
        """Make room for an answer; what it says is stored as it comes. Its place."""
        self.answer = self.held.add(Message("assistant", "", question, model=model))
        self.keep(self.answer)
        self._saved = time.monotonic()
        return self.answer

    def add_result(self, call_id: str, text: str) -> int:
        """Add what a call of the last answer gave; its place."""
        at = self.held.add(Message("tool", text, self.tree.leaf, tool_call_id=call_id))
        self.keep(at)
        return at

    def begin_more(self, answer: int) -> None:
        """Go on with an answer; what it says is stored as it comes."""
        self.tree.nodes[answer].finish_reason = None
        self.answer, self._saved = answer, time.monotonic()

    def keep(self, at: int | None = None) -> None:
        """Store a message that has changed, or the chat itself; later, if that does not work now."""
        self.held.change(at)
        if self.held.problem is None:
            self.held.flush()

    def hear(self, text: str, failed: Callable[[BaseException], None]) -> None:
        """More of the answer. Stored now and then, beside the caller; `failed` hears of mistakes."""
        if self.answer is None:
            return
        m = self.tree.nodes[self.answer]
        m.content += text
        m.ids = []  # those of an answer that goes on are not all of it; they come when it is finished
        if (now := time.monotonic()) - self._saved >= SAVE_SECONDS:
            self._saved = now
            self.held.change(self.answer)
            if self.held.problem is None:
                future = _writer.submit(self.held.flush)
                future.add_done_callback(lambda f: failed(e) if (e := f.exception()) is not None else None)

    def flush(self) -> None:
        """Store what was said so far."""
        if self.answer is not None:
            self.held.change(self.answer)
        self.held.flush()

    def finish(self, message: Message) -> Message | None:
        """The answer as the engine has it, in place of the one that was being written."""
        at, self.answer = self.answer, None
        if at is None:
            return None
        nodes, old = self.tree.nodes, self.tree.nodes[at]
        nodes[at] = replace(message, parent=old.parent, model=old.model, created=old.created)
        self.keep(at)
        return nodes[at]

    def give_up(self, reason: str = "error") -> Message | None:
        """The engine cannot go on: what was said stays, in words (its token ids are not certain)."""
        at, self.answer = self.answer, None
        if at is None:
            return None
        m = self.tree.nodes[at]
        m.finish_reason = reason
        self.keep(at)
        return m

    def request(self, question: int, model: str) -> list[Message]:
        """The path to a question, or to an answer that goes on, as the engine wants it. Ids of another model
        mean nothing to this one.
        """
        return [m.for_model(model) for m in self.tree.messages(question)]
