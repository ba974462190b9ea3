"""A conversation on the screen's side: the stored tree, the answer that is being written, and what the
engine is told about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tinychat.chats.chat_store import Chat, ChatStore, StoredMessage, path_to
from tinychat.chats.open_chat import OpenChat
from tinychat.process.client import Finished

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
        self.held, self.store, self.by_id = held, held.store, held.by_id
        self.answer: StoredMessage | None = None  # while it is being written
        self._saved = 0.0

    def close(self) -> None:
        """Let other programs have it, once it is stored. Idempotent."""
        self.held.close()

    @property
    def chat(self) -> Chat:
        """What the list of chats shows of it."""
        return self.held.chat

    @property
    def leaf(self) -> int | None:
        """The end of the present branch."""
        return self.chat.leaf

    @property
    def key(self) -> str:
        """What the engine knows this conversation by; a number once it is stored."""
        return str(self.chat.id or "new")

    # The tree

    def path(self) -> list[StoredMessage]:
        """The present branch."""
        return path_to(self.by_id, self.leaf)

    def siblings(self, message_id: int) -> list[int]:
        """The alternatives at a place, oldest first, this one among them."""
        m = self.by_id[message_id]
        return [i for i, n in self.by_id.items() if n.parent == m.parent and n.role == m.role]

    def switch(self, message_id: int) -> None:
        """Make the branch through that message the present one, down to its newest end."""
        children: dict[int | None, int] = {}
        for i, n in self.by_id.items():
            children[n.parent] = i
        while message_id in children:
            message_id = children[message_id]
        self.chat.leaf = message_id
        self.keep()

    def last(self, role: str) -> StoredMessage | None:
        """The newest message of that role on the present branch."""
        return next((m for m in reversed(self.path()) if m.role == role), None)

    def tokens_used(self) -> int:
        """Tokens that the present branch took when it was last answered."""
        for m in reversed(self.path()):
            if m.stats:
                return m.stats.get("prompt_tokens", 0) + m.stats.get("generated_tokens", 0)
        return 0

    # Saying something

    def ask(self, text: str, parent: int | None, attachments: Sequence[dict[str, str]] = ()) -> StoredMessage:
        """What the user says, and the files that go with it."""
        m = self.held.add("user", text, parent, attachments=attachments)
        self.keep(m)
        return m

    def begin_answer(self, question: int, model: str) -> StoredMessage:
        """Make room for an answer; what it says is stored as it comes."""
        self.answer = self.held.add("assistant", "", question, model)
        self.keep(self.answer)
        self._saved = time.monotonic()
        return self.answer

    def keep(self, m: StoredMessage | None = None) -> None:
        """Store a message that has changed, or the chat itself; later, if that does not work now."""
        self.held.change(m)
        if self.held.problem is None:
            self.held.flush()

    def hear(self, text: str, failed: Callable[[BaseException], None]) -> None:
        """More of the answer. Stored now and then, beside the caller; `failed` hears of mistakes."""
        self.answer.content += text
        if (now := time.monotonic()) - self._saved >= SAVE_SECONDS:
            self._saved = now
            self.held.change(self.answer)
            if self.held.problem is None:
                future = _writer.submit(self.held.flush)
                future.add_done_callback(lambda f: failed(f.exception()) if f.exception() else None)

    def flush(self) -> None:
        """Store what was said so far."""
        if self.answer is not None:
            self.held.change(self.answer)
        self.held.flush()

    def finish(self, done: Finished) -> StoredMessage:
        """The answer as the session has it."""
        m = self.answer
        m.content, m.ids, m.prompt_ids, m.prompt_text = (
            done.content,
            done.ids,
            done.prompt_ids,
            done.prompt_text,
        )
        m.finish_reason, m.stats = done.finish_reason, dict(done.stats)
        if done.thought is not None:
            m.stats["thought_tokens"] = done.thought
        self.answer = None
        self.keep(m)
        return m

    def give_up(self, reason: str = "error") -> StoredMessage | None:
        """The engine cannot go on: what was said stays, in words (its token ids are not certain)."""
        m, self.answer = self.answer, None
        if m is not None:
            m.finish_reason = reason
            self.keep(m)
        return m

    def request(self, question: int, model: str) -> list[dict[str, Any]]:
        """The path to a question, as the engine wants it. Ids of another model mean nothing to this one."""
        out = []
        for m in path_to(self.by_id, question):
            known = m.model == model
            out.append(
                {
                    "role": m.role,
                    "content": m.content,
                    "attachments": m.attachments,
                    "prompt_text": m.prompt_text if known else "",
                    "prompt_ids": m.prompt_ids if known else [],
                    "ids": m.ids if known else [],
                }
            )
        return out
