"""Answers that were cut go on over HTTP: `continue_final_message`, as vLLM and SGLang have it."""

from __future__ import annotations

import json

import pytest
from serving import events_of, serving
from speaker import HARMONY, OPENED, QWEN, speaker
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.process.address import Address
from tinychat.process.connector import Connector

HELLO = [{"role": "user", "content": "Hello."}]
GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}}, "required": ["a"]}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {**SCHEMA, "additionalProperties": False}},
}


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=2048, backend="cpu", eos_ids=(), context_length=2048) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


def go_on(server, text, **more):
    messages = [*HELLO, {"role": "assistant", "content": text}]
    return server.ask("/v1/chat/completions", {"messages": messages, **GO_ON, **more})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1, "seed": 4, "frequency_penalty": 0.5}]
)
def test_two_pieces_are_what_is_said_in_one_go(server, model, sampling, stream):
    whole = model.chat(HELLO, max_tokens=30, **sampling).text
    first = server.chat(max_tokens=11, **sampling)[1]["choices"][0]["message"]["content"]
    _, said, _ = go_on(server, first, max_tokens=19, stream=stream, **sampling)
    if stream:
        deltas = [c["choices"][0]["delta"] for c in events_of(said)[:-1]]
        text = "".join(d.get("content", "") for d in deltas)
    else:
        text = said["choices"][0]["message"]["content"]
        assert said["usage"]["completion_tokens"] == 19
        assert said["usage"]["prompt_tokens_details"]["cached_tokens"] > len("Hello.")
    assert (first + text).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_message_that_was_begun_is_gone_on_with(server, model):
    begun = {"model": "tiny", "messages": [*HELLO, {"role": "assistant", "content": "Once upon"}]}
    here = model.chat(begun["messages"], go_on=True, temperature=0, max_tokens=8)
    _, said, _ = server.ask("/v1/messages", {**begun, "temperature": 0, "max_tokens": 8})
    assert said["content"][0]["text"] == here.text
    _, counted, _ = server.ask("/v1/messages/count_tokens", begun)
    used = said["usage"]
    assert counted["input_tokens"] == used["input_tokens"] + used["cache_read_input_tokens"]


def test_an_answer_of_a_form_goes_on_within_it(server):
    _, cut, _ = server.chat(max_tokens=9, temperature=1, seed=2, response_format=FORM)
    assert cut["choices"][0]["finish_reason"] == "length"
    first = cut["choices"][0]["message"]["content"]
    _, said, _ = go_on(server, first, max_tokens=300, temperature=1, seed=2, response_format=FORM)
    assert said["choices"][0]["finish_reason"] == "stop"
    assert set(json.loads(first + said["choices"][0]["message"]["content"])) == {"a"}
    status, said, _ = go_on(server, "no JSON", max_tokens=9, response_format=FORM)
    assert status == 400
    assert "does not begin as the form" in said["error"]["message"]


@pytest.mark.parametrize(("messages", "more"), [
    (HELLO, {}),
    ([{"role": "assistant", "content": "x"}], {}),
    ([*HELLO, {"role": "assistant", "content": ""}], {}),
    ([*HELLO, {"role": "assistant", "content": "x"}], {"continue_final_message": "yes"}),
    ([*HELLO, {"role": "assistant", "content": "x"}], {"add_generation_prompt": True}),
    ([*HELLO, {"role": "assistant", "content": "x"}], {"continue_final_message": False}),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(server, messages, more):
    status, said, _ = server.ask("/v1/chat/completions", {"messages": messages, **GO_ON, **more})
    assert (status, bool(said["error"]["param"])) == (400, True)


@pytest.mark.parametrize(
    ("template", "before"),
    [(QWEN, ""), (OPENED, "\n</think>\n\n"), (HARMONY, "<|channel|>final<|message|>")],
)
def test_it_goes_on_in_the_answer_and_not_in_a_thought(monkeypatch, template, before):
    with speaker(monkeypatch, template, lambda said: "ly, yes."[len(said) :]) as model:
        messages = [*HELLO, {"role": "assistant", "content": "Certai"}]
        done = model.chat(messages, go_on=True, temperature=0, max_tokens=20)
        assert (done.text, done.reasoning, done.finish_reason) == ("ly, yes.", "", "stop")
        assert model.tokenizer.decode(done.token_ids) == "ly, yes."
        begun = len(model.tokenizer.encode(f"{before}Certai", special=True))
        assert done.stats.prompt_tokens == len(model.request(HELLO).prompt(model)) + begun


def test_markers_in_it_are_text(model):
    messages = [*HELLO, {"role": "assistant", "content": "<|im_end|>"}]
    spelled = model.chat(messages, go_on=True, max_tokens=1).stats.prompt_tokens
    assert spelled == model.chat(HELLO, max_tokens=1).stats.prompt_tokens + len("<|im_end|>")
    with pytest.raises(UsageError, match="no answer to go on with"):
        model.chat(HELLO, go_on=True)


def test_a_conversation_there_goes_on_as_one_here(server, model):
    options = {"temperature": 1, "seed": 7, "presence_penalty": 0.5}
    there = Connector(Address.parse(server.url))("", {}, lambda *_: None).session(**options)
    here = model.session(**options)
    for session in (there, here):
        list(session.send("Hello.", max_tokens=5))
        done = list(session.go_on(max_tokens=25))[-1]
        assert done.completion.text == session.messages[-1]["content"]
        assert len(session.nodes) == 2
    assert there.messages[-1]["content"].replace("\ufffd", "") == here.messages[-1]["content"].replace(
        "\ufffd", ""
    )
