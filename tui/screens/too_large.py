"""A message with more tokens than the model can read: what to do with it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.widgets.turn import duration


class TooLargeScreen(PanelScreen[str]):
    """Gives "first", "all" or None."""

    def __init__(self, tokens: int, context: int, room: int, rate: float | None, evicts: bool):
        """rate: tokens that are read in a second, if known. evicts: the model can be told all of it."""
        super().__init__()
        self.tokens, self.context, self.room, self.rate, self.evicts = tokens, context, room, rate, evicts

    def _time(self, tokens: int) -> str:
        return f" (about {duration(tokens / self.rate)})" if self.rate else ""

    def compose(self) -> ComposeResult:
        over = f"This message has {self.tokens:,} tokens and the context holds {self.context:,}."
        with Vertical(id="panel"):
            yield Label("Too large to be read at once", classes="title")
            yield Label(over, classes="trouble", markup=False)
            options = [
                Option(f"Send the first {self.room:,} tokens{self._time(self.room)}", "first"),
                Option("Cancel", "cancel"),
            ]
            if self.evicts:
                forgets = "the model forgets much of it meanwhile"
                options.insert(1, Option(f"Send all of it{self._time(self.tokens)}: {forgets}", "all"))
            yield OptionList(*options, markup=False)
            yield Label("enter chooses · esc cancels; what you wrote stays", classes="foot")

    def on_mount(self) -> None:
        """Focus the button that is pressed most."""
        chooser = self.query_one(OptionList)
        chooser.highlighted = 0
        chooser.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Chosen."""
        self.dismiss(None if event.option_id == "cancel" else event.option_id)
