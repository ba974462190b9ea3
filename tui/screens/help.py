"""Keys and commands, made from the bindings themselves."""

from __future__ import annotations

from collections.abc import Iterator

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from tinychat.tui.commands import COMMANDS
from tinychat.tui.host import Host
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import Line, pad, wrap
from tinychat.tui.widgets.lines import Lines

KEY_COLUMN = 20
VI_TITLE = "The composer in vi's normal mode (esc)"
VI_ROWS = [
    ("h j k l w b e", "move; k and j also to earlier and later messages"),
    ("0 ^ $ gg G", "to the ends of the line and of the text"),
    ("i a I A o O", "write"),
    ("x X D C s dd cc yy", "delete, change, copy; also d c y with a movement; counts before each"),
    ("p P u", "put what was deleted or copied; undo"),
]


def groups(app: Host) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(keys, what they do)]) of an app, as they are now."""
    yield from app.keys.rows()
    if app.preferences.vi:
        yield VI_TITLE, VI_ROWS
    yield "Commands", [(f"/{c.name} {c.argument}".strip(), c.help) for c in COMMANDS]


class HelpLines(Lines):
    """The text of the help."""

    app: Host

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
        names = f"Names for [keys] in {self.app.preferences.path}: {', '.join(self.app.keys.names())}"
        return [*out, [], *wrap([(names, "faint")], width)]


class HelpScreen(PanelScreen[None]):
    """Scrolls with the usual keys."""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", can_focus=True):
            lines = HelpLines()
            lines.styles.height = "auto"
            yield lines
