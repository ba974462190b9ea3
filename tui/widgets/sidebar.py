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
from tinychat.chats.chat_store import ChatStore, Hit
from tinychat.tui.excerpts import FOUND, fitted
from tinychat.tui.hints import Hints
from tinychat.tui.host import Host
from tinychat.tui.messages import ChatAction, OpenChat, Trouble
from tinychat.tui.text import clean, shorten, width_of

MOST = 200  # chats that are listed
AT_ONCE = 40  # more than a terminal shows; the others are laid out when these are painted
ROOM = 34  # cells of a line, unless the terminal shows nothing else
FIELD_HINTS = ("enter open the first", "↓ to the list", "esc close")
LIST_HINTS = {  # by the names of the keys
    "open_chat": "open",
    "rename_chat": "rename",
    "delete_chat": "delete",
    "undo_delete": "undo",
    "export_chat": "export",
}


class ChatList(OptionList):
    """Chats, newest first."""

    BINDING_GROUP_TITLE = "The list of chats"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "open", id="open_chat"),
        Binding("r", "chat('rename')", "rename", id="rename_chat"),
        Binding("d,delete", "chat('delete')", "delete (u or /undo brings it back)", id="delete_chat"),
        Binding(
            "u", "chat('undo')", "bring the chat deleted last back; again: the one before", id="undo_delete"
        ),
        Binding("x", "chat('export')", "export as Markdown", id="export_chat"),
        Binding("up,k", "up", "up; from the first one to the search", show=False),
        Binding("j", "cursor_down", "down", show=False),
        Binding("slash", "search", "search", show=False),
        Binding("escape", "screen.toggle_sidebar", "close"),
    ]

    def action_up(self) -> None:
        """One up; from the first one to the search field."""
        if self.highlighted in (None, 0):
            self.action_search()
        else:
            self.action_cursor_up()

    def action_search(self) -> None:
        """To the search field."""
        self.screen.query_one(Search).focus()

    def action_chat(self, action: str) -> None:
        """Leave it to the screen."""
        option = self.highlighted_option
        if option is not None or action == "undo":
            self.post_message(ChatAction(int(option.id or 0) if option is not None else 0, action))


class Search(Input):
    """The search field."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "list", "to the list", show=False),
        Binding("escape", "screen.toggle_sidebar", "close", show=False),
    ]

    def action_list(self) -> None:
        """Into the list, if there is something in it."""
        chats = self.screen.query_one(ChatList)
        if chats.highlighted is not None:
            chats.focus()


class Sidebar(Vertical):
    """Search field and list."""

    app: Host

    def __init__(self, store: ChatStore, now: Callable[[], float] = time.time):
        super().__init__(id="sidebar")
        self.store, self.now = store, now
        self.current = 0
        self._filled_for = 0  # cells of a line
        self._filling = 0  # how often the list was filled

    def compose(self):
        """Nothing is read from the store before it is shown."""
        yield Search(placeholder="Search the chats", id="search", compact=True)
        yield ChatList(id="chats", markup=False, compact=True)
        yield Hints(FIELD_HINTS, id="sidebar-hints")

    def find(self, text: str) -> None:
        """Search for `text`."""
        self.query_one(Input).value = text
        self.query_one(Input).focus()

    @property
    def _room(self) -> int:
        return self.size.width - 4 if self.size.width > ROOM + 4 else ROOM

    @property
    def words(self) -> str:
        """What is searched for."""
        return self.query_one(Search).value.strip()

    def fill(self) -> None:
        """Read the list anew; the highlight stays on its chat, or in its place where that is gone."""
        try:
            if self.words:
                hits = self.store.search(self.words, MOST + 1)
            else:
                hits = [Hit(c, []) for c in self.store.chats(MOST + 1)]
        except TinychatError as e:
            self.post_message(Trouble(e))
            hits = []
        hits, more = hits[:MOST], len(hits) > MOST
        chats = self.query_one(ChatList)
        option, place = chats.highlighted_option, chats.highlighted or 0
        before = option.id if option is not None else str(self.current)
        self._filled_for = self._room
        place_before = next((i for i, hit in enumerate(hits) if str(hit.chat.id) == before), None)
        first = AT_ONCE + (place_before or place)
        self._filling += 1
        chats.clear_options()
        self._add(hits[:first], False if hits[first:] else more)
        if hits:  # where it was, if the one that it was on is gone
            chats.highlighted = min(place, len(hits) - 1) if place_before is None else place_before
        if hits[first:]:
            self.call_after_refresh(self._add_later, self._filling, hits[first:], more)

    def _add_later(self, filling: int, hits: list[Hit], more: bool) -> None:
        """Lay out what nobody sees yet, unless the list is another one by now."""
        if filling == self._filling:
            self._add(hits, more)

    def _add(self, hits: list[Hit], more: bool) -> None:
        chats = self.query_one(ChatList)
        chats.add_options([Option(self._prompt(hit), str(hit.chat.id)) for hit in hits])
        if more or not hits:
            said = f"… and older ones: search for {'another word' if self.words else 'a word'}"
            if not hits:
                said = "Nothing found." if self.words else "No chats yet."
            chats.add_option(Option(Content.assemble((said, "$secondary")), disabled=True))

    def _prompt(self, hit: Hit) -> Content:
        width = self._room
        here = "● " if hit.chat.id == self.current else ""
        when = ago(self.now() - hit.chat.updated)
        title = here + shorten(clean(hit.chat.title) or "(untitled)", width - width_of(here))
        parts: list = [(title, "bold"), "\n"]
        if hit.pieces:
            for text, style in fitted(hit.pieces, width):
                parts.append((text, "bold $primary" if style == FOUND else "$secondary"))
        else:
            parts.append((f"{when} · {hit.chat.messages} messages", "$secondary"))
        return Content.assemble(*parts)

    def on_resize(self) -> None:
        """Excerpts are as long as there is room."""
        if self._room != self._filled_for:
            self.fill()

    def on_descendant_focus(self) -> None:
        """Hint at the keys of what has the focus."""
        in_list = self.query_one(ChatList).has_focus
        hints = [f"{self.app.keys.named(name)} {does}" for name, does in LIST_HINTS.items()]
        self.query_one(Hints).show([*hints, "↑ search", "esc close"] if in_list else FIELD_HINTS)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search as it is typed."""
        event.stop()
        self.fill()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter opens the first chat found."""
        event.stop()
        chats = self.query_one(ChatList)
        if chats.highlighted is not None:
            chats.focus()
            chats.action_select()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A chat is chosen."""
        event.stop()
        self.post_message(OpenChat(int(event.option_id or 0), self.words))


def ago(seconds: float) -> str:
    """How long ago, roughly."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"
