"""The engine in this process: what the screen's engine does, without one."""

from __future__ import annotations

import os

import pytest
import pytest_asyncio
from engine_helpers import Heard, ask
from fake_worker import load
from said import says
from tiny import tiny_model

from tinychat.conversation import Message
from tinychat.process.local import LocalEngine
from tinychat.process.protocol import Began, Calling, Failed, Finished, Loaded, Text

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def engine():
    heard = Heard()
    engine = LocalEngine(heard.append, load)
    assert await engine.count("nobody is there") is None
    await engine.start()
    engine.load("fake", {})
    await heard.wait(Loaded)
    yield engine, heard
    await engine.close()


async def test_it_answers_counts_and_stops_as_a_process_does(engine):
    client, heard = engine
    assert client.pid == os.getpid()
    ask(client, "slow 10000")
    await heard.wait(Text)
    assert await client.count("one two three") == 3
    assert await client.head("one two three", 2) == "one two"
    client.cancel()
    done = (await heard.wait(Finished)).message
    assert done.finish_reason == "cancelled"
    assert done.content.startswith("word0 ")
    assert isinstance(next(e for e in heard if isinstance(e, (Began, Text))), Began)
    ask(client, "refuse")
    assert (await heard.wait(Failed)).what == "This cannot be answered."
    ask(client, "lose")  # there is no other process that could have the device again
    assert "LOST" in (await heard.wait(Failed, 2)).what
    ask(client, "hello")
    assert (await heard.wait(Finished, 2)).message.content == "echo: hello"


async def test_what_was_running_when_it_is_closed_says_nothing_more(engine):
    client, heard = engine
    ask(client, "slow 10000")
    await heard.wait(Text)
    await client.close()
    assert client.pid is None
    said = len(heard)
    assert await client.count("x") is None
    await client.start()
    client.load("missing", {})
    assert (await heard.wait(Failed)).during == "load"
    assert [type(e).__name__ for e in heard[said:] if isinstance(e, (Text, Finished))] == []
    await client.close()
    await client.close()


async def test_a_model_answers_as_its_session_does():
    heard = Heard()
    engine = LocalEngine(heard.append, lambda *_: tiny_model(ctx=256, backend="cpu"))
    await engine.start()
    engine.load("tiny", {"keep_kv": False})
    await heard.wait(Loaded)
    engine.answer("new", [], None, {})
    failed = await heard.wait(Failed)
    assert "nothing to regenerate" in failed.what
    ask(engine, "hi")
    first = (await heard.wait(Finished)).message
    await engine.close()
    with tiny_model(ctx=256, backend="cpu") as model:
        session = model.session(temperature=0)
        list(session.send("hi"))
    assert (first.content, first.ids, first.prompt_ids) == (
        session.nodes[1].content,
        session.nodes[1].ids,
        session.nodes[1].prompt_ids,
    )


async def test_options_that_are_none_are_refused_before_anything_is_loaded():
    heard = Heard()
    engine = LocalEngine(heard.append)
    await engine.start()
    for options in ({"progress": 1}, {"model": "x"}, {"ctx": "many"}, {"keep_kv": False, "kv_bits": 9}):
        heard.clear()
        engine.load("no-such-model", options)
        failed = await heard.wait(Failed)
        assert next(iter(sorted(set(options) - {"keep_kv"}))) in failed.what
        assert "bug" not in failed.todo
    await engine.close()


async def test_calls_are_told_and_their_results_go_back(monkeypatch):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    heard = Heard()

    def load(*_):
        model = tiny_model(ctx=2048, backend="cpu", context_length=2048)
        says(monkeypatch, model, f"I add.\n{call}", "Five.", call)
        return model

    engine = LocalEngine(heard.append, load)
    await engine.start()
    engine.load("tiny", {})
    assert (await heard.wait(Loaded)).takes_tools
    path = [Message("user", "2 + 3?")]
    engine.answer("new", path, None, {"temperature": 0}, [tool])
    asked = (await heard.wait(Finished)).message
    assert (asked.finish_reason, asked.content, asked.written) == ("tool_calls", "I add.", f"I add.\n{call}")
    assert "".join(e.text for e in heard if isinstance(e, Text)) == "I add."
    assert [e for e in heard if isinstance(e, Calling)] == [Calling(0, "add")]
    result = Message("tool", "5", tool_call_id=asked.tool_calls[0]["id"])
    engine.answer("new", [*path, asked, result], None, {"temperature": 0}, [tool])
    answer = (await heard.wait(Finished, 2)).message
    assert (answer.finish_reason, answer.content) == ("stop", "Five.")
    assert answer.stats["cached_tokens"] >= asked.stats["prompt_tokens"] + asked.stats["generated_tokens"] - 1
    engine.answer("other", path, None, {"temperature": 0})  # without tools the same words are words
    assert (await heard.wait(Finished, 3)).message.content == call
    await engine.close()
