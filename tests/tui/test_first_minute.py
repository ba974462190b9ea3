"""An empty home: what `tinychat run` offers, with a hub and without one, and what it takes afterwards."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from contextlib import contextmanager

import pytest
from cli_helpers import in_process, on_terminal
from hub_server import Hub
from scripted import listed, screen_text, wait_until
from terminal import Terminal
from tiny_gguf import write
from tui_helpers import answered, make_app, say

from tinychat.base import remembered
from tinychat.base.preferences import Preferences
from tinychat.cli.first import usual_model
from tinychat.hub.aliases import ALIASES
from tinychat.hub.fits import DEMO, Fit, Machine, fit_of, offer
from tinychat.hub.reach import begun
from tinychat.process.protocol import Failed, Loading
from tinychat.tui.screens.first import FirstScreen
from tinychat.tui.screens.models import ModelScreen

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A tiny model's file; it says what no model does, but it is one."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write(path)
    return path.read_bytes()


@contextmanager
def hub_with(content):
    """A hub that has every known model: a repository with that one file under the name that it has there."""
    repos = {}
    for alias in ALIASES.values():
        for source in alias.sources:
            if source.kind == "hf" and source.where.endswith(".gguf"):
                owner, name, file = source.where.split("/", 2)
                repos.setdefault(f"{owner}/{name}", {})[file] = content
    hub = Hub(repos=repos)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def words(screen):
    """What stands in a panel, whatever its lines are."""
    return " ".join(screen.replace("│", " ").split())


def opened(home, hub_url, size=(80, 24)):
    """`tinychat run` as a newcomer types it."""
    command = [sys.executable, "-m", "tinychat", "run"]
    environment = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return Terminal(command, *size, TINYCHAT_HOME=str(home), **environment)


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")


@needs_tmux
def test_enter_takes_the_first_the_download_goes_on_where_it_stopped_and_the_next_run_asks_nothing(
    tmp_path, tiny_file
):
    large = tiny_file + bytes(
        32_000_000
    )  # what stands behind the tensors is read by nobody; 10 MB are a chunk
    with hub_with(large) as hub:
        hub.pause = 0.015  # every 64 kB
        with opened(tmp_path, hub.url) as t:
            shown = t.wait("enter downloads it")
            offered = re.findall(r"^ *│ +(\S+)  (.+?) +│$", shown, re.MULTILINE)[:4]
            names = [name for name, _ in offered]
            assert names[-1] == DEMO
            assert offered[-1][1].startswith("the demo")
            assert len(names) == len(set(names)) == 4
            for facts in re.findall(r"([\d.]+ [MG]B, memory [\d.]+ [MG]B, ≈ [\d.]+ tok/s, \S+)", shown):
                assert facts
            t.press("Enter")
            t.wait(lambda s: re.search(r"█.* \d+ %", s) is not None)
            t.press("C-q")
            t.wait("ended with 0")
        assert begun(names[0]) > 0  # of this home
        hub.pause, before = 0.0, len(hub.seen)
        with opened(tmp_path, hub.url) as t:
            t.wait(f"ready · {names[0]}")
            assert "Which model" not in t.screen
            asked = [r for c, path, r in hub.seen[before:] if c == "GET" and path.endswith(".gguf")]
            assert asked, hub.seen[before:]
            assert all(r and not r.startswith("bytes=0-") for r in asked), asked
            t.type("hello")
            t.press("Enter")
            t.wait(
                lambda s: "first token" in s and "tokens" in s
            )  # none, where its first token ends the turn


@needs_tmux
def test_without_a_hub_it_says_so_keeps_the_choice_and_takes_what_is_typed(tmp_path, tiny_file):
    (tmp_path / "mine.gguf").write_bytes(tiny_file)
    with opened(tmp_path, NOWHERE, (60, 20)) as t:
        t.wait("enter downloads it")
        t.press("Enter")
        t.wait(lambda s: "downloaded: [Errno 111] Connection refused. Check the network" in words(s), 40)
        t.wait("enter downloads it")
        t.press("Up", "Enter")  # from the first to the last: all, or one of yours
        t.wait("or type a name")
        t.wait("enter loads")
        t.press("Tab")
        t.type(str(tmp_path / "mine.gguf"))
        t.press("Enter")
        t.wait("ready · mine")
        t.press("C-q")
        t.wait("ended with 0")
    assert remembered.recall(tmp_path / "settings.json")["model"] == str(tmp_path / "mine.gguf")


def test_where_nobody_can_be_asked_the_demo_answers_and_it_is_said(home, monkeypatch):
    taken = []
    monkeypatch.setattr("tinychat.cli.chat._answer", lambda model, *_: taken.append(model) or 0)
    code, _, err = in_process("run", "why is the sky blue?")
    assert (code, taken) == (0, [DEMO])
    said = rf"There is no model on this machine yet: {DEMO} answers, a demo .*\nFor a better one: "
    assert re.match(said, err)


def test_where_nothing_can_be_had_two_lines_say_what_to_do(home, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("tinychat.hub.fits.available_memory", lambda: 100_000_000)
        code, out, err = in_process("run", "why is the sky blue?")
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "Error: There is no model on this machine yet.",
        "All names: tinychat list --available",
    ]
    code, _, err = in_process("serve")
    assert code == 3
    assert re.match(
        r"Get one: tinychat pull \S+ \([\d.]+ [MG]B\)\. All names: tinychat list --available$",
        err.splitlines()[1],
    )
    monkeypatch.setenv("TINYCHAT_OFFLINE", "1")
    code, out, err = in_process("run", "why is the sky blue?")
    assert (code, len(err.splitlines())) == (3, 2)
    assert "tinychat is offline" in err


def test_line_by_line_it_asks_for_a_number(home, monkeypatch, tiny_file, tmp_path):
    monkeypatch.setattr("tinychat.hub.fits.available_memory", lambda: 4_000_000_000)
    code, shown = on_terminal("run", "--plain", typed="")
    assert code == 130  # the end of the input is no choice
    assert re.search(r"1  \S+ +[\d.]+ [MG]B +≈ [\d.]+ tok/s +\S+ +\w+", shown)
    assert "the demo" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_what_is_taken_where_no_model_is_named(home, tiny_file):
    preferences = Preferences(home / "config.toml")
    assert usual_model(preferences) == ("", "")
    for name, at in (("older", "2026-01-02"), ("newer", "2026-03-04")):
        folder = home / "models" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f'{{"name": "{name}", "pulled_at": "{at}"}}')
    assert usual_model(preferences) == ("newer", "pulled last")
    remembered.remember(model="older")
    assert usual_model(preferences) == ("older", "used last")
    remembered.remember(model="gone", theme="x")
    assert usual_model(preferences) == ("newer", "pulled last")
    assert remembered.recall() == {"model": "gone", "theme": "x"}
    assert usual_model(Preferences(home, model="set")) == ("set", "config.toml")


def fits(memory, bandwidth, disk=10**12):
    machine = Machine(memory, disk, bandwidth)
    return machine, [fit_of(name, a.size, machine) for name, a in ALIASES.items()]


def test_a_model_fits_where_memory_and_disk_have_room_and_its_speed_is_bandwidth_by_bytes(home):
    _, found = fits(8_000_000_000, 20.0, disk=3_000_000_000)
    by_name: dict[str, Fit] = {f.name: f for f in found}
    assert by_name["qwen3-4b"].rate == pytest.approx(20e9 / 2.5e9)
    assert by_name["qwen3-30b-a3b"].rate == pytest.approx(20e9 / (18.6e9 * 0.11))  # a few of its experts
    assert by_name["qwen3-4b"].memory == int(2.5e9 * 1.15) + 300_000_000
    assert by_name["qwen3-4b"].why_not == ""
    assert by_name["llama-3.1-8b"].why_not == "more than 3.0 GB disk"
    assert by_name["gpt-oss-20b"].why_not == "more than 8.0 GB memory"


@pytest.mark.parametrize(
    ("memory", "bandwidth", "first"),
    [
        (16e9, 40.0, "llama-3.1-8b"),
        (32e9, 40.0, "llama-3.1-8b"),  # what is larger would come in an hour
        (8e9, 20.0, "qwen3-4b"),
        (4e9, 8.0, "llama-3.2-1b"),
        (4e9, 2.0, "qwen3-0.6b"),  # nothing is quick: the smallest
    ],
)
def test_three_that_fit_are_offered_the_best_first_and_the_demo_behind_them(home, memory, bandwidth, first):
    machine, found = fits(int(memory), bandwidth)
    chosen = offer(found, machine)
    assert (chosen[0].name, chosen[-1].name) == (first, DEMO)
    assert len(chosen) == 4
    assert not any(f.why_not for f in chosen)


def test_a_machine_with_little_memory_is_offered_what_there_is(home):
    machine, found = fits(1_000_000_000, 8.0)
    assert [f.name for f in offer(found, machine)] == [DEMO]


@pytest.mark.asyncio
async def test_a_choice_that_fails_is_offered_again_with_the_reason_and_the_question_waits(store):
    app = make_app(store, "Here.", loads=False)
    app.model = app.conversation.chat.model = ""
    app.engine.listed = listed(installed=False)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: "enter downloads it" in screen_text(app))
        assert app.engine.loaded == []
        await pilot.press("escape")
        await wait_until(pilot, lambda: "No model yet: ctrl+o chooses one." in screen_text(app))
        await say(pilot, "early")
        await wait_until(pilot, lambda: isinstance(app.screen, FirstScreen))
        await wait_until(pilot, lambda: "enter downloads it" in screen_text(app))
        await pilot.press("down", "enter")
        await wait_until(pilot, lambda: app.engine.loaded == ["other"])
        app.engine.on_event(Failed("x/other cannot be downloaded: no route.", "Check the network.", "load"))
        await wait_until(pilot, lambda: "no route. Check the network." in screen_text(app))
        await wait_until(pilot, lambda: "enter downloads it" in screen_text(app))
        app.engine.loads = True
        await pilot.press("enter")  # the same again
        await answered(pilot)
        assert app.engine.loaded == ["other", "other"]
        assert "Here." in screen_text(app)
    assert remembered.recall(app.settings_path)["model"] == "other"


@pytest.mark.asyncio
async def test_the_welcome_shows_how_far_the_download_is(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(60, 20)) as pilot:
        app.engine.on_event(Loading("Downloading small", 300_000_000, 600_000_000))
        await wait_until(pilot, lambda: "█" * 18 + "░" * 18 + " 50 %" in screen_text(app))


@pytest.mark.asyncio
async def test_offline_it_offers_what_another_program_has_and_no_downloads(store):
    app = make_app(store)
    app.model = app.conversation.chat.model = ""
    app.engine.listed = listed(installed=False) | {"offline": True, "cached": ["Qwen/Qwen3-0.6B"]}
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: "enter takes it" in screen_text(app))
        assert "tinychat is offline" in screen_text(app)
        assert "better" not in screen_text(app)
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.engine.loaded == ["Qwen/Qwen3-0.6B"])
        await wait_until(pilot, lambda: app.chat.ready)


@pytest.mark.asyncio
async def test_all_models_are_behind_the_last_line(store):
    app = make_app(store)
    app.model = app.conversation.chat.model = ""
    app.engine.listed = listed(installed=False)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: "enter downloads it" in screen_text(app))
        await pilot.press("up", "enter")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelScreen))
        await wait_until(pilot, lambda: "too-large" in screen_text(app))
