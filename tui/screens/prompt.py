"""One question, one line."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Input, Label

from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean


class PromptScreen(PanelScreen[str]):
    """Gives the line, or None."""

    def __init__(self, question: str, value: str = ""):
        super().__init__()
        self.question, self.value = question, clean(value)

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label(self.question, classes="title", markup=False)
            yield Input(self.value, compact=True)
            yield Label("enter: yes · esc: no", classes="foot")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Done."""
        self.dismiss(event.value)
