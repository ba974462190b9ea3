"""Pictures of the chat screen: the real screen, its real engine and a model that answers."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = (118, 30)  # columns and rows
BEFORE = ("Name three colours.", "What is the capital of France?")  # chats that stand in the list
QUESTION = "Write a Python function that reverses a string. Only the code."
SEEDS = 1, 3  # of the two answers to it
PATIENCE = 300.0  # seconds for an answer


def make(folder: Path, model: str) -> None:
    """Write tui.svg (a conversation with two branches and the list of chats) and tree.svg (its tree)."""
    from tinychat.hub import store

    path = str(store.resolve(model))
    kept = os.environ.get("TINYCHAT_HOME")
    with tempfile.TemporaryDirectory() as home:
        os.environ["TINYCHAT_HOME"] = home
        try:
            asyncio.run(_take(folder, model, path))
        finally:
            os.environ.pop("TINYCHAT_HOME")
            if kept is not None:
                os.environ["TINYCHAT_HOME"] = kept


async def _take(folder: Path, model: str, path: str) -> None:
    import json

    from tinychat.chats.chat_store import ChatStore
    from tinychat.tui.app import make_app

    home = Path(os.environ["TINYCHAT_HOME"])
    if path.endswith(".gguf"):  # so the picture has the model's name and not where its file lies
        (home / "aliases.json").write_text(json.dumps({model: f"file:{path}"}))
    store = ChatStore()
    app = make_app(model, store, None, None, {"temperature": 0.4, "max_tokens": 150}, {})
    async with app.run_test(size=SIZE) as pilot:
        await _until(pilot, lambda: app.chat.ready)
        for question in BEFORE:
            await _ask(pilot, question)
            await _ask(pilot, "/new")
        await _ask(pilot, f"/set seed {SEEDS[0]}")
        await _ask(pilot, QUESTION)
        await _ask(pilot, f"/set seed {SEEDS[1]}")
        await _ask(pilot, "/regen")
        await pilot.press("ctrl+b")
        await pilot.pause(0.5)
        _save(app, folder / "tui.svg")
        await pilot.press("escape", "f3")
        await pilot.pause(0.5)
        _save(app, folder / "tree.svg")
    store.close()


async def _ask(pilot: Any, text: str) -> None:
    """Type a line and wait until what it began has ended."""
    chat = pilot.app.chat
    chat.composer.input.focus()
    chat.composer.text = text
    await pilot.pause()
    chat.composer.close_completion()
    await pilot.press("enter")
    await pilot.pause(0.3)
    await _until(pilot, lambda: not chat.answering)
    await pilot.pause(0.3)


async def _until(pilot: Any, true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise SystemExit("The screen did not come to an end; is the model here?")
        await pilot.pause(0.05)


def _save(app: Any, path: Path) -> None:
    """Write what the screen shows, without blanks at the ends of lines."""
    svg = app.export_screenshot(title="tinychat")
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
