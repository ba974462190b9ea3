"""The engine whose answers come from a server: what the chat screen asks of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest
import pytest_asyncio
from dialects import Vllm
from engine_helpers import Heard, ask
from scripted_server import ScriptedServer, answer, status

from tinychat.base.events import Notice
from tinychat.conversation import Message
from tinychat.process import remote
from tinychat.process.address import Address
from tinychat.process.connector import Connector
from tinychat.process.protocol import Began, Calling, Failed, Finished, Loaded, Loading, Text
from tinychat.process.remote_engine import RemoteEngine

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def engine(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    heard = Heard()
    with ScriptedServer() as played:
        engine = RemoteEngine(Connector(Address.parse(played.url)), heard.append)
        await engine.start()
        yield engine, heard, played
        await engine.close()


async def test_it_answers_and_stops_as_a_process_does(engine):
    client, heard, played = engine
    client.load(f"@{played.url}/v1", {"keep_kv": False})
    loaded = await heard.wait(Loaded)
    assert loaded.asked == f"@{played.url}/v1"
    assert loaded.facts["model"] == f"org/big-model@{played.url}/v1"
    assert loaded.facts["ctx"] == 32768
    assert loaded.sampling["temperature"] is None
    assert client.pid == os.getpid()
    ask(client, "slow", ("user", "before"), ("assistant", "<think>\nhm\n</think>\n\nthat"))
    await heard.wait(Text)
    assert played.questions[0]["temperature"] == 0
    assert [m["content"] for m in played.questions[0]["messages"]] == ["before", "that", "slow"]
    assert await client.count("one two three") is None  # servers do not say
    assert await client.limits() is None
    client.cancel()
    m = (await heard.wait(Finished)).message
    assert m.finish_reason == "cancelled"
    assert m.content.startswith("echo: slow")
    assert isinstance(next(e for e in heard if isinstance(e, (Began, Text))), Began)
    played.scripts = [answer("b", "a"), status(400, {"error": "no"})]
    ask(client, "think")
    m = (await heard.wait(Finished, 2)).message
    assert m.split() == ("a", "b")
    ask(client, "refused")
    failed = await heard.wait(Failed)
    assert (failed.during, failed.what.endswith("(400): no.")) == ("answer", True)


async def test_the_server_lists_the_models(engine):
    client, _, played = engine
    played.listed = {"data": [{"id": "a", "max_model_len": 100}, {"id": "b"}]}
    found = await client.models()
    at = f"{played.url}/v1"
    assert found == {
        "installed": [
            {"name": f"a@{at}", "label": "a", "ctx": 100},
            {"name": f"b@{at}", "label": "b", "ctx": 0},
        ],
        "available": [],
        "server": at,
    }
    played.models = status(500)
    assert await client.models() is None


async def test_a_server_that_is_silent_holds_up_nobody(engine):
    client, heard, played = engine
    silent = threading.Event()
    played.models = lambda h: silent.wait(20)
    client.load("x", {})
    await heard.wait(Loading)
    began = time.monotonic()
    await client.start()  # as esc does beside a load: the one before is gone
    silent.set()
    played.models = lambda h: h.page(played.listed)
    client.load("org/big-model", {})
    await heard.wait(Loaded)
    assert time.monotonic() - began < 15  # the page comes after 20
    assert not [e for e in heard if isinstance(e, Failed)]


async def test_what_is_tried_again_is_said(engine):
    client, heard, played = engine
    client.load("org/big-model", {})
    await heard.wait(Loaded)
    played.scripts = [status(503)]
    ask(client, "hi")
    assert "503" in (await heard.wait(Notice)).message
    assert (await heard.wait(Finished)).message.content == "echo: hi"
    await asyncio.sleep(0)


async def test_tools_are_passed_on_and_a_cut_answer_goes_on(engine):
    client, heard, played = engine
    played.listed = Vllm.listed()
    client.load(f"@{played.url}/v1", {"keep_kv": False})
    assert (await heard.wait(Loaded)).takes_tools
    tool = {
        "type": "function",
        "function": {"name": "add", "description": "", "parameters": {"type": "object"}},
    }
    call = Vllm.call(0, "call_1", "add", "{}")
    played.scripts = [Vllm.answer({"tool_calls": [call]}, {}, reason="tool_calls"), answer(", two.")]
    client.answer("1", [Message("user", "?")], None, {}, [tool])
    m = (await heard.wait(Finished)).message
    assert [c["function"]["name"] for c in m.tool_calls] == ["add"]
    assert (m.finish_reason, played.questions[-1]["tools"]) == ("tool_calls", [tool])
    assert [e.name for e in heard if isinstance(e, Calling)] == ["add"]
    cut = Message("assistant", "One", 0, finish_reason="length")
    client.answer("2", [Message("user", "Count."), cut], None, {})
    m = (await heard.wait(Finished, 2)).message
    assert (m.content, m.finish_reason) == ("One, two.", "stop")
    assert played.questions[-1]["continue_final_message"] is True
