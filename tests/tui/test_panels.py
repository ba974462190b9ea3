"""The panels: help, models, sampling, statistics, and the palette."""

from __future__ import annotations

import re

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.tui import commands
from tinychat.tui.screens.stats import plot
from tinychat.tui.text import plain

pytestmark = pytest.mark.asyncio


# Branches


async def test_help_lists_every_binding_and_command(store):
    app = make_app(store)
    async with app.run_test(size=(100, 60)) as pilot:
        await pilot.press("f1")
        await wait_until(pilot, lambda: "keys and commands" in screen_text(app))
        from tinychat.tui.screens.help import groups

        names = [row for _, rows in groups(app) for row, _ in rows]
        assert "ctrl+j, shift+enter, alt+enter" in names
        assert all(any(name.startswith(f"/{c.name}") for name in names) for c in commands.COMMANDS)
        await pilot.press("escape")
        assert app.screen is app.chat


async def test_models_show_size_and_fit_and_can_be_chosen(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+o")
        await wait_until(pilot, lambda: "does not fit" in screen_text(app))
        text = screen_text(app)
        assert re.search(r"● demo +94.0 MB  ≈ 85 tok/s +the demo; knows little", text)
        assert "to download:" in text
        await pilot.press("down")
        await wait_until(pilot, lambda: "Does not fit: needs more than 4.0 GB memory." in screen_text(app))
        await pilot.press("down", "down", "down")
        await wait_until(pilot, lambda: "810 MB, memory 1.2 GB, ≈ 9.9 tok/s, llama3.2" in screen_text(app))
        assert "Good for summaries, rewriting. Fits. 37 % is here." in screen_text(app)
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.engine.loaded == ["demo", "other"])
        assert "ready · other" in screen_text(app)


async def test_sampling_is_set_checked_and_sent(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: "0.7 (the model's)" in screen_text(app))
        await pilot.press(*"9999", "enter")
        await wait_until(pilot, lambda: "It must lie between" in screen_text(app))
        await pilot.press(*(["backspace"] * 4), *"0.2", "enter")
        await wait_until(pilot, lambda: "Sampling: temperature 0.2" in screen_text(app))
        await say(pilot, "question")
        await answered(pilot)
    assert app.engine.requests[0].params == {"temperature": 0.2}
    assert store.chat(1).params == {"temperature": 0.2}


async def test_the_bandwidth_counts_the_weights_once_a_step_whatever_it_decides(store):
    app = make_app(store, Script("a b", stats={"decode_tps": 160.0, "tokens_per_step": 4.0}))
    async with app.run_test(size=(100, 40)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await pilot.press("f2")
        await wait_until(pilot, lambda: "4.0 GB/s, 50% of the 8.0 GB/s" in screen_text(app))


async def test_stats_plot_the_speed_over_the_chat(store):
    app = make_app(store, *[Script("a b", stats={"decode_tps": float(r)}) for r in (10, 20, 40)])
    async with app.run_test(size=(100, 40)) as pilot:
        for i in range(3):
            await say(pilot, f"question {i}")
            await answered(pilot, i + 1)
        await pilot.press("f2")
        await wait_until(pilot, lambda: "Speed of this chat" in screen_text(app))
        assert "best 40.0" in screen_text(app)
        await wait_until(pilot, lambda: "4.0 GB/s, 50% of the 8.0 GB/s" in screen_text(app))


async def test_the_plot_is_to_scale():
    rows = [plain(line)[7:] for line in plot([0, 50, 100], 20, 4)]
    assert rows == ["  █", "  █", " ██", " ██"]


async def test_the_palette_runs_commands(store):
    app = make_app(store)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("ctrl+p")
        await pilot.press(*"stats")
        await wait_until(pilot, lambda: "speed over this chat" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Speed of this chat" in screen_text(app))
