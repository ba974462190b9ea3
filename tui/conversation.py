"""A conversation on the screen's side: the stored tree, the answer that is being written, and what the
engine is told about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tinychat.client import Finished
from tinychat.errors import TinychatError
from tinychat.store import Chat, ChatStore, StoredMessage, path_to

SAVE_SECONDS = 0.7  # of an answer in the making, at most that much is not yet stored
THINK, THINK_END = "<think>", "</think>"

_writer = ThreadPoolExecutor(1, thread_name_prefix="store")


class Conversation:
    """A chat that is open. Nothing is stored before the first message."""

    def __init__(self, store: ChatStore, model: str, system: str | None = None, params: dict | None = None):
        self.store = store
        self.chat = Chat(0, "", model, system, dict(params or {}))
        self.by_id: dict[int, StoredMessage] = {}
        self.leaf: int | None = None
        self.answer: StoredMessage | None = None  # while it is being written
        self._release: Callable[[], None] = lambda: None
        self._saved = 0.0

    @classmethod
    def open(cls, store: ChatStore, chat_id: int) -> Conversation:
        """A stored chat, claimed for this program. Raises ChatLockedError, TinychatError."""
        release = store.lock(chat_id)
        try:
            chat = store.chat(chat_id)
            self = cls(store, chat.model)
            self.chat, self._release = chat, release
            self.by_id = {m.id: m for m in store.messages(chat_id)}
            self.leaf = chat.leaf
        except BaseException:
            release()
            raise
        return self

    def close(self) -> None:
        """Let other programs have it. Idempotent."""
        self._release()

    @property
    def key(self) -> str:
        """What the engine knows this conversation by."""
        return str(self.chat.id)

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
        self.leaf = message_id
        self.store.update(self.chat.id, leaf=message_id)

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

    def ask(self, text: str, parent: int | None) -> StoredMessage:
        """Store what the user says."""
        if not self.chat.id:
            self.chat = self.store.create(self.chat.model, self.chat.system, self.chat.params)
            self._release = self.store.lock(self.chat.id)
        return self._add(self.store.add(self.chat.id, "user", text, parent))

    def begin_answer(self, question: int, model: str) -> StoredMessage:
        """Make room for an answer; what it says is stored as it comes."""
        self.answer = self._add(self.store.add(self.chat.id, "assistant", "", question, model))
        self._saved = time.monotonic()
        return self.answer

    def _add(self, m: StoredMessage) -> StoredMessage:
        self.by_id[m.id] = m
        self.leaf = m.id
        if not self.chat.title:
            self.chat = self.store.chat(self.chat.id)
        return m

    def hear(self, text: str, failed: Callable[[TinychatError], None]) -> None:
        """More of the answer. Stored now and then, beside the caller; `failed` is called if that does not
        work.
        """
        self.answer.content += text
        if (now := time.monotonic()) - self._saved >= SAVE_SECONDS:
            self._saved = now
            future = _writer.submit(self.store.write_partial, self.answer.id, self.answer.content)
            future.add_done_callback(lambda f: failed(f.exception()) if f.exception() else None)

    def flush(self) -> None:
        """Store what was said so far."""
        if self.answer is not None:
            self.store.write_partial(self.answer.id, self.answer.content)

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
        self.store.finish(m)
        return m

    def give_up(self, reason: str = "error") -> StoredMessage | None:
        """The engine cannot go on: what was said stays, in words (its token ids are not certain)."""
        m, self.answer = self.answer, None
        if m is not None:
            m.finish_reason = reason
            self.store.finish(m)
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
                    "prompt_text": m.prompt_text if known else "",
                    "prompt_ids": m.prompt_ids if known else [],
                    "ids": m.ids if known else [],
                }
            )
        return out


def split_thought(content: str, prompt_text: str = "") -> tuple[str | None, str, bool]:
    """An answer's reasoning (None: there is none), the rest, and whether the reasoning is closed.

    The opening tag may be missing: then the template wrote it at the end of the prompt, or the answer only
    closes.
    """
    opened = prompt_text.rstrip().endswith(THINK)
    stripped = content.lstrip()
    if stripped.startswith(THINK):
        opened, content = True, stripped[len(THINK) :]
    elif not opened and content and THINK.startswith(stripped) and stripped:
        return "", "", False  # the tag itself is arriving
    end = content.find(THINK_END)
    if end >= 0 and (opened or THINK not in content[:end]):
        return content[:end].strip("\n"), content[end + len(THINK_END) :].lstrip("\n"), True
    if opened:
        return content.strip("\n"), "", False
    return None, content, True
