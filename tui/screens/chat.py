"""The conversation: what was said, where one writes, what the machine is doing."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Static

from tinychat.base.errors import TinychatError
from tinychat.tui.messages import MoreBelow
from tinychat.tui.screens.actions import ChatActions
from tinychat.tui.widgets.composer import Composer
from tinychat.tui.widgets.status import StatusLine
from tinychat.tui.widgets.surface import Column, Row
from tinychat.tui.widgets.transcript import Transcript

NARROW = 90


class ChatScreen(ChatActions):
    """One conversation at a time."""

    BINDING_GROUP_TITLE = "Everywhere"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "stop the answer; what was said stays", id="stop"),
        Binding("f4", "end_thought", "end the thought: answer now", id="end_thought"),
        Binding("ctrl+b", "toggle_sidebar", "chats, and search", id="chats"),
        Binding("ctrl+n", "new_chat", "new chat", id="new_chat"),
        Binding("ctrl+r", "regenerate", "answer again", id="answer_again"),
        Binding("ctrl+o", "model", "choose the model", id="model"),
        Binding("ctrl+t", "sampling", "sampling", id="sampling"),
        Binding("f1", "help", "keys and commands", id="help"),
        Binding("f2", "stats", "speed and memory", id="stats"),
        Binding("f3", "tree", "tree of the chat: its branches", id="tree"),
        Binding("ctrl+end", "follow", "to the end of the conversation", priority=True, id="to_the_end"),
        Binding("pageup", "page(-1)", "scroll up", priority=True, id="scroll_up"),
        Binding("pagedown", "page(1)", "scroll down", priority=True, id="scroll_down"),
        Binding("ctrl+up,alt+up", "focus_last", "to the messages", id="messages"),
        Binding("ctrl+z", "app.suspend_process", "to the shell; fg comes back", priority=True, id="suspend"),
    ]
    AUTO_FOCUS = "#input"

    def compose(self) -> ComposeResult:
        with Row(), Column(id="main"):
            yield Transcript()
            yield Static(id="notice", markup=False)
            yield Composer(self._history, lambda: self.conversation.tree)
            yield StatusLine()

    def _history(self) -> list[str]:
        try:
            return self.app.store.said()
        except TinychatError:  # it is said where it matters
            return []

    async def on_mount(self) -> None:
        self.status.tell(state="starting", model=self.model)
        await self.show_conversation()
        self.on_resize()

    def on_more_below(self, message: MoreBelow) -> None:
        """Say it at the edge of the composer."""
        key = self.app.keys.named("to_the_end")
        self.composer.input.border_title = f"↓ more below · {key}" if message.below else ""

    def on_resize(self) -> None:
        """A narrow terminal shows one thing at a time."""
        self.set_class(self.app.size.width < NARROW, "narrow")
