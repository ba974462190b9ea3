"""/compact: the chat goes on from a summary that its model writes, as a branch; the old one stays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from textual.timer import Timer

from tinychat.base.errors import UsageError
from tinychat.chats import summary
from tinychat.conversation import Message
from tinychat.process.protocol import Died, Failed, Finished, Text
from tinychat.tui.conversation import Conversation
from tinychat.tui.screens.answering import TICK
from tinychat.tui.screens.calling import Calling
from tinychat.tui.screens.parts import status_of
from tinychat.tui.widgets.turn import duration

TEMPLATE = 6  # tokens that a template writes around a message, about
KEPT = 6  # the last question and its answer stay as they are where they take that part of the context or less


@dataclass
class Compaction:
    """A summary that is being written. kept: messages that stay as they are; before: tokens of the chat."""

    conversation: Conversation
    kept: list[Message]
    before: int
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    clock: Timer | None = None


class Compacting(Calling):
    """One summary at a time; an answer is not made beside it."""

    _compaction: Compaction | None = None

    @property
    def answering(self) -> bool:
        return self._compaction is not None or super().answering

    async def command_compact(self, rest: str) -> None:
        """Ask the model for a summary of the present branch."""
        if self.answering:
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")
        if not self.ready:
            raise UsageError(
                "There is no model that could write a summary.", f"{self.key('model')} chooses one."
            )
        path = self.conversation.path()
        while path and path[-1].role != "assistant":
            path.pop()  # it never got an answer
        if not path or summary.is_summary(path):
            raise UsageError("There is nothing to make shorter yet.", "Say something first.")
        c, length = self.conversation, summary.length_for(self.context)
        said, kept = await self._split(path, length)
        self._compaction = Compaction(c, kept, c.tokens_used())
        self._compaction.clock = self.set_interval(TICK, self._show_summarising)
        self._show_summarising()
        params: dict[str, Any] = {**c.chat.params, "max_tokens": length}
        if any(m.stats.get("reasoning_tokens") for m in path):
            params |= {"max_tokens": 2 * length, "think_budget": length}
        asked = [m.for_model(self.model) for m in summary.asking(said, length)]
        tools = self.app.toolbox.offered() if self.takes_tools else []  # as before: what is read stays read
        self.app.engine.answer(c.key, asked, c.chat.system, params, tools)

    async def _split(self, path: list[Message], length: int) -> tuple[list[Message], list[Message]]:
        """What is summarised, and what stays as it is: the last exchange where it is short; more where the
        context has no room for the rest, the question and the summary, and nothing would make way.
        """
        at = max((i for i, m in enumerate(path) if m.role == "user"), default=0)
        if at == 0 or await self._tokens_of(path[at:]) > (self.context or 4096) // KEPT:
            at = len(path)
        if not self.context or self.facts.get("evicts", True):
            return path[:at], path[at:]
        room = self.context - summary.PROMPT_TOKENS - length
        while at and _used(path[:at]) > room:
            at = max((i for i, m in enumerate(path[:at]) if m.role == "user"), default=0)
        kept = path[at:]
        if at and await self._tokens_of(kept) <= self.context // 4:
            return path[:at], kept
        return await self._shortened(path, room), []

    async def _shortened(self, path: list[Message], room: int) -> list[Message]:
        """The conversation with its longest message cut, so that it fits."""
        longest = max(path, key=lambda m: len(m.as_read()))
        tokens = await self._tokens_of([longest])
        left = max(16, tokens - max(0, await self._tokens_of(path) + 8 * len(path) - room))
        text = await self.app.engine.head(longest.as_read(), left) or longest.as_read()[: 3 * left]
        cut = replace(longest, content=f"{text}\n[…]", attachments=[])
        cut.forget_ids()
        return [cut if m is longest else m for m in path]

    async def _tokens_in(self, text: str) -> int:
        counted = await self.app.engine.count(text)
        return len(text) // 3 if counted is None else counted

    async def _tokens_of(self, messages: Sequence[Message]) -> int:
        return await self._tokens_in("\n".join(m.as_read() for m in messages))

    def _show_summarising(self) -> None:
        if (c := self._compaction) is None:
            return
        waited = duration(time.monotonic() - c.began)
        how_far = f"{c.tokens} tokens, {waited}" if c.tokens else f"reading, {waited}"
        if self._stopping:
            how_far = "stopping"
        self.status.tell(state="summarising")
        self.say(f"Writing a summary: {how_far}. {self.key('stop')} stops it, and the chat stays as it is.")

    # What the engine says goes to the summary while one is written

    def hear(self, event: Text) -> None:
        if self._compaction is None:
            super().hear(event)
        else:
            self._compaction.tokens = event.tokens

    async def _finished(self, event: Finished) -> None:
        if self._compaction is None:
            await super()._finished(event)
            return
        m = event.message
        text = m.split()[1].strip()
        c = self._leave_compaction()
        if m.finish_reason not in ("stop", "length") or not text:
            why = "was stopped" if m.finish_reason == "cancelled" else "has no text"
            self.composer.take_back()
            self.say(f"The summary {why}: the chat is as it was.")
            return
        if m.finish_reason == "length":
            text += " …"
        after = await self._tokens_in("\n".join([summary.ASKED, text, *(k.as_read() for k in c.kept)]))
        after += TEMPLATE * (2 + len(c.kept))
        if after >= c.before:
            self.composer.take_back()
            self.say(f"The summary is no shorter ({after:,} tokens): the chat is as it was.")
            return
        c.conversation.begin_branch(summary.going_on(text, self.model, c.kept, after))
        await self.show_conversation()
        self.transcript.follow()
        self.say(
            f"Compacted: {c.before:,} tokens are {after:,} now. The whole chat stays: ‹ at the first message."
        )
        if self.composer.queue.words:
            await self.say_words(self.composer.queue.take(0))

    async def _failed(self, event: Failed) -> None:
        if self._compaction is not None and event.during != "load":
            self._leave_compaction()
            self.composer.take_back()
            self.say(f"{event.what} {event.todo} The chat is as it was.", error=True)
            return
        await super()._failed(event)

    async def _died(self, event: Died) -> None:
        self._leave_compaction()
        await super()._died(event)

    async def _replace_engine(self) -> None:
        self._leave_compaction()
        await super()._replace_engine()

    def _leave_compaction(self) -> Compaction:
        c, self._compaction = self._compaction, None
        if c is not None:
            if c.clock is not None:
                c.clock.stop()
            self._settle(None, None)
            last = self.conversation.last("assistant")
            self.status.tell(**status_of(last))
        return c or Compaction(self.conversation, [], 0)


def _used(path: Sequence[Message]) -> int:
    """Tokens that a conversation took when it was last answered."""
    for m in reversed(path):
        if n := m.stats.get("prompt_tokens"):
            return n + m.stats.get("generated_tokens", 0)
    return 0
