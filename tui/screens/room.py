"""Room that is left in the model's context: what is free for a message, and what is said when it runs out."""

from __future__ import annotations

from typing import Any

from tinychat.conversation import are_losses
from tinychat.tui.screens.parts import ChatParts

MARGIN = 64  # tokens that a template may write around a message
NEARLY = 0.9  # of the context in use: it is said once what comes then


class Room(ChatParts):
    """Tokens of the context, as far as they are known."""

    _said_full = False  # of the present branch

    def free(self) -> int | None:
        """Tokens that a message may have now without anything being given up; None while not known."""
        if not self.context or self.status.facts.get("evicted"):  # of such a chat some is always given up
            return None
        tree, used = self.conversation.tree, 0
        leaf = tree.leaf if self.editing is None else tree.nodes[self.editing].parent
        if leaf is not None:
            used = self.conversation.tokens_used(leaf)
        return max(0, self.context - MARGIN - used)

    def tell_room(self, aloud: bool = True) -> None:
        """Have the status line and the files in the composer know it; aloud: say when it is nearly full."""
        used, evicts = self.conversation.tokens_used(), self.facts.get("evicts")
        self.status.tell(used=used)
        self.composer.chips.tell(self.context or None, self.free(), evicts)
        nearly = NEARLY * self.context < used and bool(self.context) and not self.status.facts.get("evicted")
        if aloud and nearly and not self._said_full and evicts is not None:
            then = "what matters least is given up then" if evicts else "the answer ends there"
            self.say(f"The context is {used / self.context:.0%} full: {then}. /compact makes room.")
        self._said_full = nearly
        self.mark_given_up()

    def mark_given_up(self) -> None:
        """Say at each message how much of it the model's memory has given up, as the last answer told."""
        tree = self.conversation.tree
        last = self.conversation.last("assistant")
        losses: Any = last.stats.get("given_up") if last is not None else None
        told = dict(zip(tree.path(), losses, strict=False)) if are_losses(losses) else {}
        if told or not self.answering:  # what was known holds until an answer has ended
            self.transcript.mark_given_up(told)

    async def show_conversation(self) -> None:
        await super().show_conversation()
        self.tell_room(aloud=False)
