"""Base of the screens that open over the chat: a box in the middle, esc closes it."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

Result = TypeVar("Result")


class PanelScreen(ModalScreen[Result]):
    """Compose a container with the id `panel`."""

    CSS_PATH = "panel.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "close")]

    def action_close(self) -> None:
        """Without a result."""
        self.dismiss(None)
