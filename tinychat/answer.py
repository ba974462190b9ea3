"""The message of an answer while it is being made."""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable

from tinychat.base.events import Done, Event, FinishReason, TextDelta
from tinychat.conversation import Message


class AnswerInTheMaking:
    """`message` is whole once it has ended; what was said before is kept here, token by token."""

    def __init__(self, question: int, prompt_text: str, prompt_ids: list[int], before: Message | None = None):
        """before: the message, if its answer goes on."""
        self.message = before or Message("assistant", "", question)
        self.message.prompt_text, self.message.prompt_ids = prompt_text, prompt_ids
        self.message.finish_reason = None
        self._said, self._written, self._ids = io.StringIO(), io.StringIO(), array("i", self.message.ids)
        self._said.write(self.message.content)
        self._written.write(self.message.whole)

    def hear(self, event: Event) -> None:
        """Take in an event of the generation."""
        if isinstance(event, TextDelta):
            self._said.write(event.kept)
            self._written.write(event.written)
            if event.token_id is not None:
                self._ids.append(event.token_id)
        elif isinstance(event, Done):
            m = self.message
            m.content, m.written = event.completion.written or self._said.getvalue(), ""
            if calls := event.completion.tool_calls:
                m.content, m.written = self._said.getvalue(), event.completion.written
                m.tool_calls = [call.as_dict() for call in calls]
            m.ids = event.completion.token_ids
            m.stats = event.stats.as_dict()
            m.finish_reason = event.finish_reason  # last: whoever sees it takes the others as they are

    def end(self, reason: FinishReason, cut_ids: Callable[[list[int], str], list[int]]) -> None:
        """No more will come; `reason` holds unless it was said already. cut_ids: the ids of an answer that
        was cut to a text.
        """
        m = self.message
        if m.finish_reason is None:
            # Tokens whose text was still held back were never said; what would be calls is text.
            m.content, m.written, m.tool_calls = self._written.getvalue(), "", []
            m.ids = cut_ids(self._ids.tolist(), m.content)
            m.finish_reason = reason
