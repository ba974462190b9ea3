"""The messages of the present branch, newest at the bottom; older ones are mounted when the reader gets
there.
"""

from __future__ import annotations

from typing import ClassVar

from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.reactive import var

from tinychat.conversation import Message
from tinychat.tui.messages import MoreBelow
from tinychat.tui.widgets.surface import Surface
from tinychat.tui.widgets.turn import Turn

AT_ONCE = 16
MARGIN = 5  # lines from the top at which older messages are fetched


class Transcript(Surface, VerticalScroll, can_focus=False):
    """Follows the end of the conversation until the reader scrolls up."""

    BINDINGS: ClassVar[list[BindingType]] = []
    virtual_size = var(Size(0, 0))  # as for `Lines`: one layout a new line is enough

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._below = False  # whether there is more below what is in view
        self._older: list[tuple[int, Message, list[int]]] = []
        self._losses: dict[
            int, tuple[int, int]
        ] = {}  # of messages by their places: tokens given up, of how many

    def on_mount(self) -> None:
        """Stay at the end."""
        self.anchor()

    @property
    def turns(self) -> list[Turn]:
        """The mounted messages, oldest first."""
        return [child for child in self.children if isinstance(child, Turn)]

    def turn(self, node: int) -> Turn | None:
        """The widget of the message at a place of the tree, if it is mounted."""
        return next((t for t in self.turns if t.node == node), None)

    async def show(self, messages: list[tuple[int, Message, list[int]]]) -> None:
        """Show a branch: (place, message, its siblings), oldest first. What is on the screen stays."""
        turns, keep = self.turns, 0
        if not self._older:
            while keep < min(len(turns), len(messages)) and turns[keep].message is messages[keep][1]:
                keep += 1
        for turn, (_, _, siblings) in zip(turns[:keep], messages[:keep], strict=True):
            if turn.branches != siblings:
                turn.branches = siblings
                turn.changed()
        fresh = messages[keep:]
        with self.app.batch_update():
            await self.remove_children(turns[keep:])
            self._older = fresh[:-AT_ONCE] if keep == 0 else []
            if new := [Turn(*m) for m in (fresh[-AT_ONCE:] if keep == 0 else fresh)]:
                await self.mount_all(new)
        self.anchor()

    def mark_given_up(self, losses: dict[int, tuple[int, int]]) -> None:
        """Have messages say how many of their tokens were given up, by their places; others say nothing."""
        if losses or self._losses:
            self._losses = losses
            for turn in self.turns:
                turn.mark_given_up(*losses.get(turn.node, (0, 0)))

    async def load_older(self) -> bool:
        """Mount some more at the top, without moving what is seen; False if there are none."""
        if not self._older:
            return False
        await self._mount_older(max(0, len(self._older) - AT_ONCE))
        return True

    async def load_to(self, node: int) -> Turn | None:
        """The widget of a message of the present branch; it is mounted with all that come after it."""
        at = next((i for i, (place, _, _) in enumerate(self._older) if place == node), None)
        if at is not None:
            await self._mount_older(max(0, at - MARGIN))
        return self.turn(node)

    async def _mount_older(self, start: int) -> None:
        older, self._older = self._older[start:], self._older[:start]
        first = self.turns[0] if self.turns else None
        before = self.virtual_size.height
        at = self.scroll_y
        turns = [Turn(*m) for m in older]
        for turn in turns:
            turn.given_up = self._losses.get(turn.node, turn.given_up)
        await self.mount_all(turns, before=first)

        def keep_place() -> None:
            self.scroll_to(y=at + self.virtual_size.height - before, animate=False)

        self.call_after_refresh(keep_place)

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if self.following == self._below:
            self._below = not self._below
            self.post_message(MoreBelow(self._below))
        if new < old and new <= MARGIN and self._older:
            self.run_worker(self.load_older(), group="older", exclusive=False)

    def follow(self) -> None:
        """Back to the end."""
        self.anchor()

    @property
    def following(self) -> bool:
        """Whether the end is in view."""
        return self.scroll_y >= self.max_scroll_y - 1
