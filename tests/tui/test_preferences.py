"""config.toml and the screen: how models are loaded, the theme, and what new chats begin with."""

from __future__ import annotations

import pytest
from scripted import ScriptedEngine, screen_text, wait_until
from tui_helpers import answered, say

from tinychat.base.preferences import Preferences
from tinychat.tui.app import make_app
from tinychat.tui.theme import LIGHT

pytestmark = pytest.mark.asyncio
FILE = 'theme = "light"\n[load]\nctx = 4096\nkv_bits = 8\n[models.other.load]\nctx = 100\n'


class Engine(ScriptedEngine):
    def load(self, model, options):
        self.options = dict(options)
        super().load(model, options)


async def test_each_model_is_loaded_as_the_file_says_and_flags_hold_in_its_place(store, tmp_path):
    (tmp_path / "config.toml").write_text(FILE)
    preferences, engine = Preferences.read(tmp_path / "config.toml"), Engine()
    app = make_app("demo", store, options={"kv_bits": 16}, engine=engine, preferences=preferences)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        assert app.theme == LIGHT.name
        assert engine.options == {"ctx": 4096, "kv_bits": 16}
        await app.chat.choose_model("other")
        await wait_until(pilot, lambda: app.chat.ready)
        assert engine.options == {"ctx": 100, "kv_bits": 16}


async def test_new_chats_begin_as_this_one(store, tmp_path):
    preferences = Preferences(tmp_path / "config.toml")
    app = make_app("demo", store, engine=Engine(), preferences=preferences)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "/system Be brief.")
        await say(pilot, "/set temperature 0.25")
        await say(pilot, "hello")
        await answered(pilot)
        await say(pilot, "/default")
        await wait_until(pilot, lambda: "New chats begin like this one" in screen_text(app))
        kept = Preferences.read(preferences.path)
        assert (kept.model, kept.general.system) == ("demo", "Be brief.")
        assert dict(kept.general.sampling) == {"temperature": 0.25}
        preferences.path.write_text("model = ")
        await say(pilot, "/default")
        await wait_until(pilot, lambda: "line 1" in screen_text(app))
    assert preferences.path.read_text() == "model = "


async def test_a_prompt_is_completed_and_sent_with_its_settings(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "shout.md").write_text(
        '+++\nsystem = "Loud."\nsampling.top_k = 2\n+++\n/help {{input}}!'
    )
    engine = Engine()
    app = make_app("demo", store, engine=engine, preferences=Preferences(tmp_path / "config.toml"))
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        await pilot.press(*"/prompt sh")
        await wait_until(pilot, lambda: "shout" in screen_text(app))
        await pilot.press("tab", *"hello", "enter")
        await answered(pilot)
        await say(pilot, "/prompt whisper x")
        await wait_until(pilot, lambda: "There is no prompt whisper." in screen_text(app))
    (request,) = engine.requests
    assert [m.content for m in request.path] == ["/help hello!"]
    assert (request.system, request.params) == ("Loud.", {"top_k": 2})
