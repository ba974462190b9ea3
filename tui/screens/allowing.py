"""A call of a tool that waits for the user's word."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Label, OptionList, Static
from textual.widgets.option_list import Option

from tinychat.mcp.tools import Tool
from tinychat.tui.screens.models import LOW
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean
from tinychat.tui.widgets.calls import pretty

SHORT = 150  # characters of what a server says of a tool that are seen at once
UNASKED = 0.6  # seconds in which keys are not taken for an answer: they were typed for something else


class AllowingScreen(PanelScreen[str]):
    """Gives "once", "always" or "never"; None stops all calls."""

    def __init__(self, tool: Tool, arguments: str):
        super().__init__()
        self.tool, self.arguments = tool, arguments
        self.ready = False  # to take a key for an answer

    def compose(self) -> ComposeResult:
        about = clean(self.tool.description).strip()
        with Vertical(id="panel"):
            yield Label(f"The model wants to call {self.tool.where}", classes="title", markup=False)
            if about:
                short = about[:SHORT] + (" … (more below the arguments)" if about[SHORT:] else "")
                yield Label(f"The server says of it: {short}", classes="about", markup=False)
            with VerticalScroll(id="arguments"):
                yield Static(clean(pretty(self.arguments)), markup=False)
                if about[SHORT:]:
                    yield Static(f"\nThe server says of this tool:\n{about}", classes="about", markup=False)
            yield OptionList(
                Option("o  once: this call", "once"),
                Option("a  always: this tool, as it is now, with whatever arguments", "always"),
                Option("n  never: not this call, and this tool no more", "never"),
                markup=False,
                disabled=True,
            )
            yield Label("a moment …", classes="foot")

    def on_mount(self) -> None:
        """Nothing is chosen, and for a moment nothing can be."""
        self.set_class(self.app.size.height < LOW, "low")
        chooser = self.query_one(OptionList)
        chooser.highlighted = None
        self.set_timer(max(UNASKED, 0.001), self._listen)

    def _listen(self) -> None:
        self.ready = True
        n = len(self.arguments)
        foot = f"esc stops · pageup, pagedown read all {n:,} characters of the arguments"
        self.query_one(".foot", Label).update(foot)
        chooser = self.query_one(OptionList)
        chooser.disabled = False
        chooser.focus()

    def _answer(self, answer: str) -> None:
        if self.ready:
            self.dismiss(answer)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Chosen."""
        self._answer(event.option_id or "never")

    def key_o(self) -> None:
        self._answer("once")

    def key_a(self) -> None:
        self._answer("always")

    def key_n(self) -> None:
        self._answer("never")

    def key_pagedown(self) -> None:
        self.query_one("#arguments", VerticalScroll).scroll_page_down(animate=False)

    def key_pageup(self) -> None:
        self.query_one("#arguments", VerticalScroll).scroll_page_up(animate=False)
