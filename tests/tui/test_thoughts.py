"""A key that ends a thought."""

from __future__ import annotations

import pytest
from scripted import Script, wait_until
from tui_helpers import make_app, say

pytestmark = pytest.mark.asyncio


async def test_f4_ends_a_thought_and_nothing_else(store):
    app = make_app(store, Script("<think>so many words, and no end", 5, hang=True))
    async with app.run_test() as pilot:
        await pilot.press("f4")
        assert app.engine.hurried == 0
        await say(pilot, "well?")
        await wait_until(pilot, lambda: app.chat.answering and app.chat.transcript.turns[-1].thinking)
        await pilot.press("f4")
        assert app.engine.hurried == 1
        await pilot.press("escape")
