"""The chat's title and system prompt above its messages, where they say more than the first message does."""

from __future__ import annotations

from tinychat.chats.records import Chat
from tinychat.conversation import Tree
from tinychat.tui.text import Line, clean, shorten, wrap
from tinychat.tui.widgets.lines import Lines

MOST_LINES = 3  # of a system prompt


class Heading(Lines):
    """Click the title or the system prompt to change it."""

    def __init__(self) -> None:
        super().__init__(id="heading")
        self.title, self.system = "", ""
        self.display = False

    def show(self, chat: Chat, tree: Tree) -> None:
        """Those of a chat."""
        first = next((m for m in tree.nodes if m.role == "user"), None)
        usual = first is None or chat.title == first.title()
        title, system = "" if usual else clean(chat.title), clean(chat.system or "")
        if (title, system) != (self.title, self.system):
            self.title, self.system = title, system
            self.display = bool(title or system)
            self.refresh(layout=True)

    def layout_lines(self, width: int) -> list[Line]:
        """The lines at that width."""
        out: list[Line] = []
        if self.title:
            out.append([(shorten(self.title, width), "strong @screen.edit_title")])
        if self.system:
            said = " ".join(self.system.split())[: width * MOST_LINES]
            lines = wrap([("System: ", "faint"), (said, "faint @screen.edit_system")], width)
            if len(lines) > MOST_LINES or len(said) < len(" ".join(self.system.split())):
                rest: Line = [("… /system shows all of it", "faint @screen.edit_system")]
                lines = [*lines[: MOST_LINES - 1], rest]
            out += lines
        return out
