"""Messages of widgets to the screen."""

from __future__ import annotations

from collections.abc import Sequence

from textual.message import Message

from tinychat.base.errors import TinychatError
from tinychat.process.protocol import EngineEvent


class Engine(Message):
    """The engine said something."""

    def __init__(self, event: EngineEvent):
        super().__init__()
        self.event = event


class Submitted(Message):
    """The user sends what is in the composer: text, and the files (`{"name", "text"}`) that go with it."""

    def __init__(self, text: str, attachments: Sequence[dict[str, str]] = ()):
        super().__init__()
        self.text, self.attachments = text, list(attachments)


class OpenChat(Message):
    """A chat is chosen in the sidebar; `words`: what it was found by."""

    def __init__(self, chat_id: int, words: str = ""):
        super().__init__()
        self.chat_id, self.words = chat_id, words


class ChatAction(Message):
    """Something is to be done with a chat: rename, delete, export."""

    def __init__(self, chat_id: int, action: str):
        super().__init__()
        self.chat_id, self.action = chat_id, action


class MoreBelow(Message):
    """The reader has left the end of the conversation, or is there again."""

    def __init__(self, below: bool):
        super().__init__()
        self.below = below


class Attached(Message):
    """Files named with @ in the composer changed."""


class Trouble(Message):
    """Something went wrong that the user should hear of."""

    def __init__(self, error: TinychatError):
        super().__init__()
        self.error = error
