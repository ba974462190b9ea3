"""/compact: the chat goes on from a summary that its model writes, as a branch; the old one stays."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

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
        path = summary.answered(self.conversation.path())
        c, length = self.conversation, summary.length_for(self.context)
        evicts = self.facts.get("evicts", True)
        said, kept = await summary.split(path, self.context, length, evicts, self.app.engine)
        self._compaction = Compaction(c, kept, c.tokens_used())
        self._compaction.clock = self.set_interval(TICK, self._show_summarising)
        self._show_summarising()
        params = summary.sampling(c.chat.params, path, length)
        asked = [m.for_model(self.model) for m in summary.asking(said, length)]
        tools = self.app.toolbox.offered() if self.takes_tools else []  # as before: what is read stays read
        self.app.engine.answer(c.key, asked, c.chat.system, params, tools)

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
        c = self._leave_compaction()
        shorter, said = await summary.outcome(event.message, c.kept, c.before, self.model, self.app.engine)
        if not shorter:
            self.composer.take_back()
            self.say(said)
            return
        c.conversation.begin_branch(shorter)
        await self.show_conversation()
        self.transcript.follow()
        self.say(f"{said} The whole chat stays: ‹ at the first message.")
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
