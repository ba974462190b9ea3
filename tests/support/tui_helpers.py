"""A chat screen with a scripted engine, and what one does with it."""

from __future__ import annotations

from scripted import ScriptedEngine, wait_until

from tinychat.tui.app import ChatApp
from tinychat.tui.conversation import Conversation


def make_app(store, *scripts, conversation=None, loads=True, toolbox=None) -> ChatApp:
    """The app; its engine plays `scripts`."""
    conversation = conversation or Conversation(store, "demo")
    settings = store.path.parent / "settings.json"
    engine = ScriptedEngine(scripts, loads)
    return ChatApp("demo", conversation, engine=engine, settings=settings, toolbox=toolbox)


def read_by_model(request) -> str:
    """The last message of a request as the model reads it."""
    return request.path[-1].as_read()


async def say(pilot, text) -> None:
    """Put text into the composer and send it."""
    pilot.app.chat.composer.text = text
    pilot.app.chat.composer.close_completion()
    pilot.app.chat.composer.input.focus()
    await pilot.pause()
    pilot.app.chat.composer.close_completion()
    await pilot.press("enter")


async def answered(pilot, n=1) -> None:
    """Until that many answers are there and none is being made."""
    chat = pilot.app.chat
    await wait_until(
        pilot,
        lambda: not chat.answering and sum(m.role == "assistant" for m in chat.conversation.path()) >= n,
    )
    await pilot.pause()
