"""The application as its screens know it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.app import App

from tinychat.base.preferences import Preferences
from tinychat.chats.chat_store import ChatStore
from tinychat.mcp.toolbox import Toolbox
from tinychat.process.protocol import ChatEngine, Loading
from tinychat.tui.keys import Keys


class Host(App[None]):
    """Has the store, and who answers; `tinychat.tui.app.ChatApp` is the one there is."""

    store: ChatStore
    engine: ChatEngine
    options: dict[str, Any]  # of loading any model
    preferences: Preferences  # of loading one, where these say nothing
    toolbox: Toolbox
    keys: Keys  # as config.toml has them

    async def start_engine(self) -> None:
        """A new engine in place of the present one, and the model into it."""
        raise NotImplementedError

    async def load_model(self, name: str, afresh: bool = False) -> None:
        """Into the present engine, or a new one if that is gone."""
        raise NotImplementedError

    def remember_model(self, name: str, loads: bool = False) -> None:
        """Take that model the next time; loads: it is on its way, and may not be one."""
        raise NotImplementedError

    def download_pace(self, event: Loading) -> tuple[float, float]:
        """Bytes a second over the last few seconds, and seconds that are left; 0 while unknown."""
        raise NotImplementedError

    def guarded(self, call: Callable[..., None], *args: Any) -> None:
        """Call outside of Textual's messages: what goes wrong ends the program as it would inside them."""
        raise NotImplementedError

    def name_window(self, title: str) -> None:
        """What the terminal calls its window or tab."""
        raise NotImplementedError

    def leave(self, code: int = 0) -> None:
        """End; not at once if something would be lost."""
        raise NotImplementedError

    def ask_text(self, question: str, value: str, then: Callable[[str], None]) -> None:
        """Ask for a line of text; `then` gets it."""
        raise NotImplementedError

    def ask_path(self, question: str, then: Callable[[Path], None]) -> None:
        """Ask for the name of a file to write."""
        raise NotImplementedError
