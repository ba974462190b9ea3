"""Going places within a chat: to another branch, to what a search found."""

from __future__ import annotations

from typing import Any

from tinychat.base.errors import TinychatError, UsageError
from tinychat.chats import outline
from tinychat.chats.outline import Branch
from tinychat.tui.screens.hearing import Hearing


class Places(Hearing):
    """The floor of the chat screen under `actions`."""

    def command_branch(self, rest: str) -> Any:
        last = self.conversation.tree.last("assistant")
        if last is None:
            raise UsageError("There is no answer yet.", "Say something first.")
        siblings = self.conversation.tree.siblings(last)
        numbers = [str(n + 1) for n in range(len(siblings))]
        if rest and rest not in numbers:
            raise UsageError(f"There is no branch {rest}.", f"Use /branch 1 to {len(siblings)}.")
        at = numbers.index(rest) if rest else (siblings.index(last) + 1) % len(siblings)
        return self.switch(siblings[at])

    async def switch(self, node: int) -> None:
        """Show the branch through a message. Raises UsageError while an answer is being made."""
        self.not_while_answering()
        self.conversation.switch(node)
        await self.show_conversation()
        if turn := self.transcript.turn(node):
            turn.focus()

    def not_while_answering(self) -> None:
        """Raises UsageError while an answer is being made."""
        if self.answering:
            raise UsageError("Still answering.", "esc stops it.")

    # The tree

    def command_tree(self, rest: str) -> None:
        from tinychat.tui.screens.tree import TreeScreen

        tree = self.conversation.tree
        if not tree.nodes:
            raise UsageError("This chat is still empty.", "Say something first.")

        def done(branch: Branch | None) -> None:
            if branch is not None:
                self.run_worker(self._go(branch), group="go")

        self.app.push_screen(TreeScreen(outline.outline(tree)), done)

    def action_tree(self) -> None:
        """f3."""
        try:
            self.command_tree("")
        except TinychatError as e:
            self.complain(e)

    async def command_go(self, rest: str) -> None:
        self.not_while_answering()
        await self.show_branch(outline.numbered(self.conversation.tree, rest))

    async def _go(self, branch: Branch) -> None:
        try:
            await self.show_branch(branch)
        except TinychatError as e:
            self.complain(e)

    async def show_branch(self, branch: Branch) -> None:
        """Go to a branch; its first message is in view and has the focus."""
        if not branch.on_path:
            self.not_while_answering()
            self.conversation.switch(branch.start)
            await self.show_conversation()
        await self.show_message(branch.start)

    async def show_message(self, node: int) -> None:
        """Have a message of the present branch in view, with the focus."""
        if turn := await self.transcript.load_to(node):
            turn.focus(scroll_visible=False)
            self.call_after_refresh(
                self.transcript.scroll_to_widget, turn, animate=False, top=True, force=True
            )
