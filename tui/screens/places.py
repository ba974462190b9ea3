"""Going places within a chat: to another branch, to what a search found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat.base import locations
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.sampling_params import SamplingParams
from tinychat.chats import outline
from tinychat.chats.finding import Finder
from tinychat.chats.outline import Branch
from tinychat.conversation import Tree
from tinychat.dialogue import Dialogue
from tinychat.tui import messages
from tinychat.tui.conversation import Conversation
from tinychat.tui.screens.compacting import Compacting
from tinychat.tui.widgets.turn import Turn

SOON, TRIES = 0.02, 250  # seconds until a message that is being laid out is looked at again; how often


@dataclass
class Found:
    """The messages of the open chat that have what was searched for, and where the reader is."""

    finder: Finder
    nodes: list[int]
    at: int = 0  # which of the messages
    line: int | None = None  # which of its lines that have the words; None: the first, -1: the last


class Places(Compacting):
    """The floor of the chat screen under `actions`."""

    found: Found | None = None

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
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")

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

    async def command_load(self, rest: str) -> None:
        self.not_while_answering()
        path, saved, params = Dialogue.read_saved(locations.written(rest))
        own = {n: v for n, v in vars(params).items() if v is not None and v != self.defaults.get(n)}
        conversation = Conversation(self.app.store, self.model, saved.system, SamplingParams.sound(own))
        for m in saved.tree.nodes:
            m.model = saved.model if m.role == "assistant" else None
            conversation.held.change(conversation.held.add(m))
        conversation.tree.leaf = saved.leaf
        conversation.keep()
        await self.open(conversation)
        self.say(f"Read {path}.")

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

    # What a search found

    async def open(self, conversation: Conversation) -> None:
        """Another conversation."""
        self.found = None
        await super().open(conversation)

    async def on_open_chat(self, message: messages.OpenChat) -> None:
        """From the sidebar."""
        try:
            if message.chat_id != self.conversation.chat.id:
                self.not_while_answering()
                await self.open(Conversation.open(self.app.store, message.chat_id))
            else:
                self.composer.input.focus()
            if message.words:
                await self._find(message.words)
        except TinychatError as e:
            self.complain(e)
            self.composer.input.focus()
        finally:
            if self.has_class("narrow") and self.sidebar is not None and self.sidebar.display:
                await self.action_toggle_sidebar(focus=False)

    async def action_toggle_sidebar(self, focus: bool = True) -> None:
        """The list of chats, or none; focus: whether what appears has it."""
        raise NotImplementedError

    async def _find(self, words: str) -> None:
        """Go to the first message of the chat that has the words."""
        tree, finder = self.conversation.tree, self.app.store.finder(words)
        if self.found is not None and (old := self.transcript.turn(self.found.nodes[self.found.at])):
            old.mark(None)
        nodes = having(tree, finder)
        self.found = Found(finder, nodes) if nodes else None
        if self.found is not None:
            await self._show_found()

    async def next_found(self, step: int) -> None:
        """The next place that has the words, or the one before; behind the last comes the first."""
        found = self.found
        if found is None:
            raise UsageError("Nothing was searched for.", f"{self.key('chats')} searches the chats.")
        turn = self.transcript.turn(found.nodes[found.at])
        lines = turn.marks(found.finder) if turn is not None else []
        if turn is not None and found.line is not None and 0 <= found.line + step < len(lines):
            found.line += step
            self._to_line(turn)
            return
        if turn is not None and len(found.nodes) > 1:
            turn.mark(None)
        found.at = (found.at + step) % len(found.nodes)
        found.line = None if step > 0 else -1
        await self._show_found()

    async def _show_found(self) -> None:
        assert self.found is not None
        node = self.found.nodes[self.found.at]
        if node not in self.conversation.tree.path():
            self.not_while_answering()
            self.conversation.switch(node)
            await self.show_conversation()
        if turn := await self.transcript.load_to(node):
            turn.mark(self.found.finder)
            turn.focus(scroll_visible=False)
            self.call_after_refresh(self._to_line, turn)

    def _to_line(self, turn: Turn, tries: int = TRIES) -> None:
        """Scroll to the line where the reader is, once it is laid out."""
        found = self.found
        if found is None or not turn.is_attached:
            return
        lines = turn.marks(found.finder)
        laid_out = turn.whole and turn.size.height == len(turn.layout_lines(turn.content_size.width))
        if not laid_out and tries:
            self.set_timer(SOON, lambda: self._to_line(turn, tries - 1))
            return
        found.line = (
            max(0, len(lines) - 1) if found.line == -1 else min(found.line or 0, max(0, len(lines) - 1))
        )
        y = turn.virtual_region.y + (lines[found.line] if lines else 0)
        self.transcript.scroll_to(y=y - self.transcript.size.height // 3, animate=False, force=True)
        place = f", place {found.line + 1} of {len(lines)}" if len(lines) > 1 else ""
        count = f"Message {found.at + 1} of {len(found.nodes)}{place}"
        self.say(f"{count} · {self.key('next_found')} next · {self.key('previous_found')} previous")


def having(tree: Tree, finder: Finder) -> list[int]:
    """Messages that have all words of a search, or some of them where no message has all."""
    texts = [(i, m.content) for i, m in enumerate(tree.nodes)]
    return [i for i, text in texts if finder.all_in(text)] or [i for i, text in texts if finder.any_in(text)]
