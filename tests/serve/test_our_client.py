"""`tinychat run --server` and `tinychat serve`, the one against the other."""

from __future__ import annotations

import json
import threading

import pytest
from said import says
from serving import serving
from tiny import tiny_model

from tinychat.base.errors import TinychatError
from tinychat.base.events import TextDelta
from tinychat.process.address import Address
from tinychat.process.connector import Connector

HELLO = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=4096, backend="cpu", eos_ids=()) as m:
        yield m


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("TINYCHAT_API_KEY", raising=False)


def connected(server):
    return Connector(Address.parse(server.url))("", {}, lambda *_: None)


def test_a_conversation_there_is_what_it_is_here(model):
    options = {"temperature": 1, "seed": 7, "max_tokens": 12, "top_k": 5, "repeat_penalty": 1.2}
    options |= {"presence_penalty": 0.3, "frequency_penalty": 0.4, "logit_bias": {65: 2, 66: -100}}
    with serving(model) as server:
        served = connected(server)
        assert (served.id, served.n_ctx) == ("tiny", 4096)
        session = served.session(**options)
        events = list(session.send("Hello."))
        here = model.chat(HELLO, **options)
        assert "".join(e.text for e in events) == here.text
        there = events[-1].stats
        assert (there.prompt_tokens, there.generated_tokens) == (here.stats.prompt_tokens, 12)
        assert events[-1].finish_reason == "length"
        list(session.send("And?"))
        said = [
            {**HELLO[0]},
            {"role": "assistant", "content": here.text},
            {"role": "user", "content": "And?"},
        ]
        assert session.nodes[-1].split()[1] == model.chat(said, **options).text


def test_a_cancel_here_ends_the_work_there(model):
    with serving(model) as server:
        session = connected(server).session(temperature=0)
        events = session.send("Hello.")
        while not isinstance(next(events), TextDelta):
            pass
        threading.Thread(target=session.cancel).start()
        assert list(events)[-1].finish_reason == "cancelled"
        server.until(server.idle)


def test_its_key_and_its_refusals_are_understood(model, monkeypatch):
    with serving(model, key="right-key") as server:
        with pytest.raises(TinychatError, match=r"wants a key \(401\)"):
            connected(server)
        monkeypatch.setenv("TINYCHAT_API_KEY", "wrong-key")
        with pytest.raises(TinychatError, match=r"does not accept the key \(401\)"):
            connected(server)
        monkeypatch.setenv("TINYCHAT_API_KEY", "right-key")
        session = connected(server).session(max_tokens=2)
        with pytest.raises(TinychatError, match=r"refuses the question \(400\)") as e:
            list(session.send("word " * 5000))
        assert "new chat" in e.value.todo
        assert list(session.send("Hello."))[-1].finish_reason == "length"


def test_tools_and_a_schema_go_through_both(model, monkeypatch):
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: One.
            b: Another.
        """
        return a + b

    with serving(model) as server:
        session = connected(server).session(max_tokens=200)
        with monkeypatch.context() as patch:
            says(patch, model, '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>')
            done = list(session.send("2 + 3?", tools=[add]))[-1]
        assert done.finish_reason == "tool_calls"
        (call,) = done.completion.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("add", {"a": 2, "b": 3})
        asked = [
            {"role": "user", "content": "2 + 3?"},
            {**done.completion.message()},
            {"role": "tool", "content": "5", "tool_call_id": call.id},
        ]
        said = list(session.send_results(["5"], temperature=0, max_tokens=9))[-1].completion.text
        assert said == model.chat(asked, tools=[add], temperature=0, max_tokens=9).text
        session = connected(server).session(temperature=1, seed=3, max_tokens=200)
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        schema |= {"additionalProperties": False}
        session.response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert json.loads(list(session.send("?"))[-1].completion.text)["a"] in (1, 2)
