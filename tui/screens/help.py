"""Keys and commands, made from the bindings themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll

from tinychat.tui.commands import COMMANDS
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import Line, pad, wrap
from tinychat.tui.widgets.lines import Lines

KEY_COLUMN = 20


def groups(app: App[Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(keys, what they do)]) of an app and the screen under everything."""
    from tinychat.tui.widgets.composer import Input
    from tinychat.tui.widgets.sidebar import ChatList
    from tinychat.tui.widgets.turn import Turn

    screen = type(app.screen_stack[0])
    for title, owners in (
        (Input.BINDING_GROUP_TITLE, (Input,)),
        (screen.BINDING_GROUP_TITLE, (screen, type(app))),
        (Turn.BINDING_GROUP_TITLE, (Turn,)),
        (ChatList.BINDING_GROUP_TITLE, (ChatList,)),
    ):
        rows = [
            (b.key.replace(",", ", "), b.description)
            for owner in owners
            for b in owner.__dict__["BINDINGS"]
            if isinstance(b, Binding)
        ]
        yield title or "", rows
    yield "Commands", [(f"/{c.name} {c.argument}".strip(), c.help) for c in COMMANDS]


class HelpLines(Lines):
    """The text of the help."""

    def layout_lines(self, width: int) -> list[Line]:
        """Each group of keys under its title, laid out for a width."""
        out: list[Line] = []
        for title, rows in groups(self.app):
            if out:
                out.append([])
            out.append([(title, "heading")])
            for keys, what in rows:
                left: Line = pad([(keys, "strong")], KEY_COLUMN, "")
                if len(keys) >= KEY_COLUMN:
                    out.append([(keys, "strong")])
                    left = [(" " * KEY_COLUMN, "")]
                for piece in wrap([(what, "")], width - KEY_COLUMN):
                    out.append([*left, *piece])
                    left = [(" " * KEY_COLUMN, "")]
        return out


class HelpScreen(PanelScreen[None]):
    """Scrolls with the usual keys."""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", can_focus=True):
            lines = HelpLines()
            lines.styles.height = "auto"
            yield lines
