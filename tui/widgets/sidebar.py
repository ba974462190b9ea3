"""The chats that were held, with a search over everything said in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from tinychat.base.errors import TinychatError
from tinychat.chats.chat_store import MARK, UNMARK, ChatStore, Hit
from tinychat.tui.messages import ChatAction, OpenChat, Trouble
from tinychat.tui.text import clean, shorten


class ChatList(OptionList):
    """Chats, newest first."""

    BINDING_GROUP_TITLE = "The list of chats"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "open"),
        Binding("r", "chat('rename')", "rename"),
        Binding("d,delete", "chat('delete')", "delete (u or /undo brings it back)"),
        Binding("u", "chat('undo')", "bring the chat deleted last back; again: the one before"),
        Binding("x", "chat('export')", "export as Markdown"),
        Binding("escape", "screen.toggle_sidebar", "close"),
    ]

    def action_chat(self, action: str) -> None:
        """Leave it to the screen."""
        option = self.highlighted_option
        if option is not None or action == "undo":
            self.post_message(ChatAction(int(option.id or 0) if option is not None else 0, action))


class Sidebar(Vertical):
    """Search field and list."""

    def __init__(self, store: ChatStore, now: Callable[[], float] = time.time):
        super().__init__(id="sidebar")
        self.store, self.now = store, now
        self.current = 0

    def compose(self):
        """Nothing is read from the store before it is shown."""
        yield Input(placeholder="Search the chats", id="search", compact=True)
        yield ChatList(id="chats", markup=False, compact=True)

    def on_mount(self) -> None:
        """Fill the list."""
        self.fill()

    def find(self, text: str) -> None:
        """Search for `text`."""
        self.query_one(Input).value = text
        self.query_one(Input).focus()

    def fill(self) -> None:
        """Read the list anew; the highlight stays on its chat, or in its place where that is gone."""
        text = self.query_one(Input).value
        try:
            found = self.store.search(text, 200) if text.strip() else None
            hits = [Hit(c, "") for c in self.store.chats(300)] if found is None else found
        except TinychatError as e:
            self.post_message(Trouble(e))
            hits = []
        chats = self.query_one(ChatList)
        option, place = chats.highlighted_option, chats.highlighted or 0
        before = option.id if option is not None else str(self.current)
        chats.clear_options()
        chats.add_options([Option(self._prompt(hit), str(hit.chat.id)) for hit in hits])
        for i, hit in enumerate(hits):
            if str(hit.chat.id) == before:
                chats.highlighted = i
        if chats.highlighted is None and hits:
            chats.highlighted = min(place, len(hits) - 1)  # where it was: the one that it was on is gone

    def _prompt(self, hit: Hit) -> Content:
        width = 34
        here = "● " if hit.chat.id == self.current else ""
        title = here + shorten(clean(hit.chat.title) or "(untitled)", width - len(here))
        when = ago(self.now() - hit.chat.updated)
        parts: list = [(title, "bold"), "\n"]
        if hit.excerpt:
            excerpt = " ".join(hit.excerpt.replace(MARK, "\ue000").replace(UNMARK, "\ue001").split())
            left = width
            bold = False
            for piece in (
                clean(excerpt).replace("\ue000", "\0\ue000").replace("\ue001", "\0\ue001").split("\0")
            ):
                if piece.startswith("\ue000"):
                    bold = True
                elif piece.startswith("\ue001"):
                    bold = False
                piece = piece.lstrip("\ue000\ue001")[:left]
                left -= len(piece)
                parts.append((piece, "bold $primary") if bold else (piece, "$secondary"))
        else:
            parts.append((f"{when} · {hit.chat.messages} messages", "$secondary"))
        return Content.assemble(*parts)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search as it is typed."""
        event.stop()
        self.fill()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter opens the first chat found."""
        event.stop()
        chats = self.query_one(ChatList)
        if chats.option_count:
            chats.focus()
            chats.action_select()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A chat is chosen."""
        event.stop()
        self.post_message(OpenChat(int(event.option_id or 0)))


def ago(seconds: float) -> str:
    """How long ago, roughly."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"
