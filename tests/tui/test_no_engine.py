"""An engine that hangs, fails or is not there can be left, and says why."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from engine_helpers import FAKE, Heard, ask
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.base.errors import TinychatError
from tinychat.process.client import EngineClient
from tinychat.process.protocol import Died, Finished, Loaded, Loading, Text
from tinychat.tui.screens.models import ModelScreen

pytestmark = pytest.mark.asyncio


# On the screen


async def test_escape_twice_replaces_an_engine_that_does_not_stop(store):
    app = make_app(store, Script("half an answer", hang=True, deaf=True), "Whole.")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "go")
        await wait_until(pilot, lambda: "half an answer" in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: "esc again ends the engine" in screen_text(app))
        assert app.engine.starts == 1
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.engine.starts == 2 and app.chat.ready)
        assert "half an answer" in screen_text(app)
        assert "stopped" in screen_text(app)
        await say(pilot, "again")
        await answered(pilot, 2)
        assert "Whole." in screen_text(app)
    assert [m.content for m in app.engine.requests[1].path] == ["go", "half an answer", "again"]
    assert store.messages(1)[1].finish_reason == "cancelled"


async def test_a_question_without_a_model_says_why_and_opens_the_choice(store):
    app = make_app(store, "Late.")
    app.engine.broken = {"demo"}
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: "There is no model demo." in screen_text(app))
        await pilot.press("escape")  # takes the line away, not the reason
        await say(pilot, "early")
        await wait_until(pilot, lambda: isinstance(app.screen, ModelScreen))
        assert "There is no model demo. Choose another." in screen_text(app)
        await wait_until(pilot, lambda: "does not fit" in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: "waiting for a model: ctrl+o" in screen_text(app))
        await say(pilot, "/model other")
        await answered(pilot)
        assert "Late." in screen_text(app)
    assert store.messages(1)[1].model == "other"
    assert app.engine.loaded == ["demo", "other"]


async def test_a_load_that_fails_under_a_waiting_question_opens_the_choice(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "early")
        await wait_until(pilot, lambda: "waiting for the model" in screen_text(app))
        app.engine.broken = {"demo"}
        app.engine.load("demo", {})
        await wait_until(pilot, lambda: isinstance(app.screen, ModelScreen))
        await pilot.press("escape")
        await pilot.press("escape")  # and the question
        await wait_until(pilot, lambda: not app.chat.answering)
        assert "stopped" in screen_text(app)
    assert store.messages(1)[1].finish_reason == "cancelled"


async def test_another_model_chosen_while_one_loads_gets_a_process_of_its_own(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.engine.loaded == ["demo"])
        app.engine.loads = True
        await say(pilot, "/model other")
        await wait_until(pilot, lambda: app.chat.ready)
        assert app.engine.starts == 2
        assert app.engine.loaded == ["demo", "other"]
        await say(pilot, "/model third")  # nothing is under way: the process stays
        await wait_until(pilot, lambda: app.engine.loaded[-1] == "third")
        assert app.engine.starts == 2


async def test_escape_twice_leaves_a_load_that_does_not_end(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.engine.loaded == ["demo"])
        app.engine.on_event(Loading("Loading demo"))
        await wait_until(pilot, lambda: "Loading demo" in screen_text(app))
        app.chat._load = ("Loading demo", app.chat._load[1] - 100, False)
        app.chat.show_loading()
        await wait_until(pilot, lambda: "Loading demo, 10" in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: "esc again stops that" in screen_text(app))
        assert app.engine.starts == 1
        await pilot.press("escape")
        await wait_until(pilot, lambda: "Loading demo was stopped" in screen_text(app))
        assert "no model" in screen_text(app)
        assert app.engine.starts == 2
        app.engine.loads = True
        await say(pilot, "/model demo")
        await wait_until(pilot, lambda: app.chat.ready)


# The process


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def started(command):
    heard = Heard()
    client = EngineClient(heard.append, command)
    await client.start()
    return client, heard


async def test_a_stopped_process_is_ended_and_another_one_answers():
    client, heard = await started(FAKE)
    client.load("fake", {})
    await heard.wait(Loaded)
    ask(client, "slow 10000")
    await heard.wait(Text)
    pid = client.pid
    os.kill(pid, signal.SIGSTOP)
    client.cancel()
    waiting = asyncio.create_task(client.count("never answered"))
    await asyncio.sleep(0)
    await client.start()
    assert await waiting is None
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    client.load("fake", {})
    await heard.wait(Loaded, 2)
    ask(client, "hello")
    assert (await heard.wait(Finished)).message.content == "echo: hello"
    assert not any(isinstance(e, Died) for e in heard)
    os.kill(client.pid, signal.SIGSTOP)  # and one that hangs at the end is not waited for
    await asyncio.wait_for(client.close(), 10)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"not json\n", "unintelligible"),
        (b"[1]\n", "unintelligible"),
        (b"{}\n", "unintelligible"),
        (b'{"ev": "nothing"}\n', "unintelligible"),
        (b'{"ev": "text", "text": 5, "tokens": 1}\n', "unintelligible"),
        (b'{"ev": "text", "text": "", "tokens": 1, "more": 1}\n', "unintelligible"),
        (b"[" * 100_000 + b"\n", "unintelligible"),
        (b"\xff\xfe\n", "unintelligible"),
    ],
)
async def test_what_is_no_event_ends_the_process_and_is_said(says, reason):
    code = f"import os, time; os.write(1, {says!r}); time.sleep(100)"
    client, heard = await started(script(code))
    assert reason in (await heard.wait(Died)).reason
    assert client.pid is None


async def test_a_process_that_closes_its_mouth_or_leaves_its_pipes_to_others_has_died():
    client, heard = await started(script("import os, time; os.close(1); os.close(2); time.sleep(100)"))
    assert "does not speak" in (await heard.wait(Died)).reason
    code = "import subprocess, sys; subprocess.Popen(['sleep', '100']); sys.exit('the reason')"
    client, heard = await started(script(code))
    assert "the reason" in (await heard.wait(Died)).reason
    await client.close()


async def test_a_model_file_that_becomes_shorter_under_the_engine_is_the_reason(tmp_path):
    code = f"""
import os
from pathlib import Path
from tinychat.base.files import MappedFile
path = Path({str(tmp_path / "model.gguf")!r})
path.write_bytes(bytes(100_000))
mapped = MappedFile(path)
os.truncate(path, 10)
mapped.data.sum()
"""
    client, heard = await started(script(code))
    assert "model.gguf became shorter" in (await heard.wait(Died)).reason
    await client.close()


async def test_a_flood_leaves_the_loop_its_time_and_its_memory():
    code = (
        "import os\n"
        'line = b\'{"ev": "text", "text": "flood", "tokens": 1}\\n\' * 1000\n'
        "while True: os.write(1, line); os.write(2, line)\n"
    )
    client, heard = await started(script(code))
    before = psutil.Process().memory_info().rss
    loop, longest = asyncio.get_running_loop(), 0.0
    until = loop.time() + 1
    while loop.time() < until:
        at = loop.time()
        await asyncio.sleep(0)
        longest = max(longest, loop.time() - at)
        heard.clear()
    assert longest < 0.3
    assert psutil.Process().memory_info().rss - before < 50e6
    await client.kill()


async def test_a_command_that_is_not_there_is_an_error_to_act_on():
    with pytest.raises(TinychatError, match="does not start"):
        await EngineClient(print, [str(Path("/nowhere/python"))]).start()
