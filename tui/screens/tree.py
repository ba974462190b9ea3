"""The tree of the chat: every branch, and enter goes there."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from tinychat.chats.outline import Branch, here
from tinychat.tui import branches as lines
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import Line

COLOURS = {"faint": "$secondary", "marker": "$primary", "userbar": "$primary", "strong": "bold"}
SIDES = 11  # cells of the panel's width that its lines do not have: border, padding, the bar that scrolls
ABOVE_AND_BELOW = 10  # lines of its height
WIDEST = 112


class TreeScreen(PanelScreen[Branch]):
    """Gives the branch to go to, or None. What is typed leaves those whose first words have it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("pageup", "page('up')", show=False, priority=True),
        Binding("pagedown", "page('down')", show=False, priority=True),
        Binding("ctrl+home", "page('first')", show=False, priority=True),
        Binding("ctrl+end", "page('last')", show=False, priority=True),
    ]

    def __init__(self, branches: list[Branch]):
        super().__init__()
        self.branches, self.found = branches, branches

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label(
                f"The tree of this chat · {lines.headline(self.branches)}", classes="title", markup=False
            )
            yield Input(placeholder="a number, or words of a branch", compact=True)
            yield OptionList(markup=False)
            yield Label("↑ ↓ choose · enter goes there · esc closes", classes="foot")

    def on_mount(self) -> None:
        """The list, at the place where the conversation is."""
        self.query_one(OptionList).can_focus = False
        self._fill(here(self.branches))

    def on_resize(self) -> None:
        """Lay the lines out again."""
        self._fill(self._chosen)

    @property
    def _chosen(self) -> Branch | None:
        at = self.query_one(OptionList).highlighted
        return None if at is None or at >= len(self.found) else self.found[at]

    def _fill(self, at: Branch | None) -> None:
        chooser = self.query_one(OptionList)
        width = min(WIDEST, int(self.app.size.width * 0.96)) - SIDES
        chooser.styles.max_height = max(3, int(self.app.size.height * 0.92) - ABOVE_AND_BELOW)
        chooser.clear_options()
        shown = None if len(self.found) == len(self.branches) else self.found
        chooser.add_options([Option(_content(line)) for line in lines.rows(self.branches, width, shown)])
        if self.found:
            chooser.highlighted = self.found.index(at) if at in self.found else 0

    def on_input_changed(self, event: Input.Changed) -> None:
        """Leave those that have the words, or the one that has the number."""
        event.stop()
        words, chosen = event.value.casefold().split(), self._chosen
        self.found = [
            b
            for b in self.branches
            if words == [str(b.number)] or all(w in f"{b.words} {b.model}".casefold() for w in words)
        ]
        at = next((b for b in self.found if words == [str(b.number)]), chosen)
        self._fill(at)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go there."""
        event.stop()
        if self._chosen is not None:
            self.dismiss(self._chosen)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Go where a click was."""
        event.stop()
        self.dismiss(self.found[event.option_index])

    def action_move(self, step: int) -> None:
        """One up or down; the list has ends."""
        chooser = self.query_one(OptionList)
        if self.found:
            chooser.highlighted = max(0, min((chooser.highlighted or 0) + step, len(self.found) - 1))

    def action_page(self, where: str) -> None:
        """A page up or down, or to an end."""
        chooser = self.query_one(OptionList)
        actions = {
            "up": chooser.action_page_up,
            "down": chooser.action_page_down,
            "first": chooser.action_first,
            "last": chooser.action_last,
        }
        actions[where]()


def _content(line: Line) -> Content:
    return Content.assemble(*((text, COLOURS.get(style, "")) for text, style in line))
