"""The chat's system prompt, to be read and changed."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Label, TextArea

from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean


class Words(TextArea):
    """Enter is done, ctrl+j and alt+enter begin a line."""

    async def _on_key(self, event: events.Key) -> None:
        if event.key in ("enter", "ctrl+j", "alt+enter", "shift+enter"):
            event.prevent_default()
            event.stop()
            if event.key == "enter":
                self.screen.dismiss(self.text.strip())
            else:
                self.replace("\n", *self.selection)
            return
        await super()._on_key(event)


class SystemScreen(PanelScreen[str]):
    """Gives the text (empty: there is none), or None."""

    def __init__(self, system: str):
        super().__init__()
        self.system = clean(system)

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label("System prompt of this chat", classes="title")
            yield Words(self.system, soft_wrap=True, compact=True, tab_behavior="focus")
            yield Label("enter keeps it · ctrl+j new line · esc closes", classes="foot")

    def on_mount(self) -> None:
        """Write at the end."""
        words = self.query_one(Words)
        words.cursor_blink = False
        words.move_cursor(words.document.end)
        words.focus()
