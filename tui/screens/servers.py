"""MCP servers, their tools, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Label, Static

from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean


class ServersScreen(PanelScreen[None]):
    """Lines to read."""

    def __init__(self, lines: Sequence[str]):
        super().__init__()
        self.lines = lines

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label("MCP servers", classes="title")
            with VerticalScroll(id="servers"):
                yield Static(clean("\n".join(self.lines[:-1])), markup=False)
            yield Label(clean(self.lines[-1]), classes="foot", markup=False)

    def on_mount(self) -> None:
        """The arrows scroll."""
        self.query_one("#servers").focus()
