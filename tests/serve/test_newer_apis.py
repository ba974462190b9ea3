"""/v1/messages by Anthropic's official client, /v1/responses by OpenAI's, over loopback."""

from __future__ import annotations

import asyncio
import json

import pytest
from answers import CALLS, EVENTS, done
from said import says
from serving import serving
from tiny import tiny_model

from tinychat.base.events import TextDelta
from tinychat.chat_request import ChatRequest

HELLO = [{"role": "user", "content": "Hello."}]
GREEDY = {"temperature": 0}  # which newer clients of Anthropic's have no argument for


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=1024, backend="cpu", eos_ids=()) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


@pytest.fixture
def played(monkeypatch):
    """A function that has the next answers be these events."""

    def play(*events):
        monkeypatch.setattr(ChatRequest, "events", lambda self, model, cancel=None: iter(events))

    return play


# Anthropic's


@pytest.fixture(scope="module")
def anthropic(server):
    package = pytest.importorskip("anthropic", reason="needs anthropic")
    with package.Anthropic(base_url=server.url.removesuffix("/v1"), api_key="none", max_retries=0) as c:
        yield c


def test_messages_are_what_the_model_says(anthropic, model):
    asked = {"model": "tiny", "system": "Be.", "messages": HELLO, "max_tokens": 12, "extra_body": GREEDY}
    said = anthropic.messages.create(**asked)
    here = model.chat([{"role": "system", "content": "Be."}, *HELLO], temperature=0, max_tokens=12)
    assert [b.text for b in said.content] == [here.text]
    assert (said.stop_reason, said.model, said.role) == ("max_tokens", "tiny", "assistant")
    assert said.usage.output_tokens == 12
    assert said.usage.input_tokens + said.usage.cache_read_input_tokens == here.stats.prompt_tokens
    with anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == here.text
        final = stream.get_final_message()
    assert final.content[0].text == here.text
    assert final.stop_reason == "max_tokens"
    assert final.usage.cache_read_input_tokens == 32  # the whole blocks that the first one left
    assert final.usage.input_tokens + 32 == here.stats.prompt_tokens
    stop = here.text[3]
    cut = anthropic.messages.create(**asked, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert "".join(b.text for b in cut.content) == here.text[: here.text.index(stop)]


def test_wishes_that_a_model_does_not_know_are_passed_over(anthropic, openai, model):
    here = model.chat(HELLO, temperature=0, max_tokens=8).text
    wishes = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "xhigh"}}
    said = anthropic.messages.create(
        model="tiny", messages=HELLO, max_tokens=8, extra_body={**GREEDY, **wishes}
    )
    assert said.content[0].text == here
    said = openai.responses.create(
        model="tiny", input="Hello.", reasoning={"effort": "xhigh"}, temperature=0, max_output_tokens=8
    )
    assert said.output_text == here


def test_tokens_of_a_message_are_counted_as_they_are_read(anthropic, model):
    counted = anthropic.messages.count_tokens(model="tiny", messages=HELLO)
    assert counted.input_tokens == model.chat(HELLO, max_tokens=1).stats.prompt_tokens


def test_the_asynchronous_client_of_anthropics(server, model):
    package = pytest.importorskip("anthropic", reason="needs anthropic")
    here = model.chat(HELLO, temperature=0, max_tokens=8).text
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "extra_body": GREEDY}

    async def ask():
        url = server.url.removesuffix("/v1")
        async with package.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                streamed = [text async for text in stream.text_stream]
            return whole.content[0].text, "".join(streamed)

    assert asyncio.run(ask()) == (here, here)


def test_thoughts_and_calls_reach_anthropics_client(anthropic, played):
    played(*EVENTS, done())
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 50}
    whole = anthropic.messages.create(**asked)
    with anthropic.messages.stream(**asked) as stream:
        kinds = [e.type for e in stream]
        streamed = stream.get_final_message()
    assert "thinking" in kinds
    assert "input_json" in kinds
    for said in (whole, streamed):
        assert [b.type for b in said.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert said.content[0].thinking == "Let me think."
        assert said.content[2].input == {"city": "Paris", "days": 2}
        assert (said.content[2].id, said.stop_reason) == ("call_1", "tool_use")
    back = [*HELLO, {"role": "assistant", "content": streamed.content}]  # as agents send it
    back.append(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sun"}]}
    )
    played(TextDelta("sunny", 1), done("stop", "sunny", (), ""))
    assert anthropic.messages.create(**{**asked, "messages": back}).content[0].text == "sunny"


def test_errors_reach_anthropics_client(anthropic, server, played):
    import anthropic as package

    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
    for error, wrong in (
        (package.BadRequestError, {"extra_body": {"temperature": -1}}),
        (package.BadRequestError, {"max_tokens": 0}),
        (package.BadRequestError, {"messages": [{"role": "user", "content": "x" * 2000}]}),
        (package.NotFoundError, {"model": "claude"}),
    ):
        with pytest.raises(error) as e:
            anthropic.messages.create(**{**asked, **wrong})
        assert e.value.body["type"] == "error"
        assert e.value.body["error"]["message"]

    assert [m.id for m in anthropic.models.list()] == ["tiny"]
    _, said, _ = server.ask("/v1/messages", asked, {"Origin": "http://a.page"})
    assert said["error"]["type"] == "permission_error"
    assert server.ask("/v1/messages")[1]["type"] == "error"

    def breaks():
        yield TextDelta("so far", 1)
        raise RuntimeError("broken")

    played(*[])
    ChatRequest.events = lambda *_: breaks()  # undone with `played`
    with pytest.raises(package.APIStatusError), anthropic.messages.stream(**asked) as stream:
        list(stream)
    server.until(server.idle)


# OpenAI's responses


@pytest.fixture(scope="module")
def openai(server):
    package = pytest.importorskip("openai", reason="needs openai")
    with package.OpenAI(base_url=server.url, api_key="none", max_retries=0) as c:
        yield c


def test_responses_are_what_the_model_says(openai, model):
    here = model.chat([{"role": "system", "content": "Be."}, *HELLO], temperature=0, max_tokens=12)
    asked = {"model": "tiny", "instructions": "Be.", "temperature": 0, "max_output_tokens": 12}
    said = openai.responses.create(**asked, input="Hello.")
    assert said.output_text == here.text
    assert (said.status, said.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said.usage.output_tokens == 12
    with openai.responses.stream(**asked, input=HELLO) as stream:
        events = list(stream)
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert events[-1].type == "response.incomplete"
    final = events[-1].response
    assert "".join(deltas) == final.output_text == here.text
    assert final.usage.input_tokens_details.cached_tokens == 32


def test_a_response_goes_on_from_one_that_is_kept(openai, model):
    import openai as package

    asked = {"model": "tiny", "temperature": 0, "max_output_tokens": 6}
    first = openai.responses.create(**asked, input="Hello.")
    second = openai.responses.create(**asked, input="And?", previous_response_id=first.id)
    said = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And?"}]
    assert second.output_text == model.chat(said, temperature=0, max_tokens=6).text
    assert second.previous_response_id == first.id
    assert openai.responses.retrieve(first.id).output_text == first.output_text
    openai.responses.delete(first.id)
    for ask in (
        lambda: openai.responses.create(**asked, input="x", previous_response_id=first.id),
        lambda: openai.responses.retrieve(first.id),
    ):
        with pytest.raises((package.BadRequestError, package.NotFoundError)):
            ask()
    alone = openai.responses.create(**asked, input="Hello.", store=False)
    with pytest.raises(package.NotFoundError):
        openai.responses.retrieve(alone.id)


def test_the_asynchronous_client_of_openais(server, model):
    package = pytest.importorskip("openai", reason="needs openai")
    here = model.chat(HELLO, temperature=0, max_tokens=8).text
    asked = {"model": "tiny", "input": "Hello.", "max_output_tokens": 8, "temperature": 0}

    async def ask():
        async with package.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            whole = await client.responses.create(**asked)
            stream = await client.responses.create(**asked, stream=True)
            streamed = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            return whole.output_text, "".join(streamed)

    assert asyncio.run(ask()) == (here, here)


def test_thoughts_and_calls_reach_openais_client(openai, played):
    played(*EVENTS, done())
    whole = openai.responses.create(model="tiny", input="Hello.")
    with openai.responses.stream(model="tiny", input="Hello.") as stream:
        kinds = {e.type for e in stream}
        streamed = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= kinds
    for said in (whole, streamed):
        assert [i.type for i in said.output] == ["reasoning", "message", "function_call", "function_call"]
        assert said.output[0].content[0].text == "Let me think."
        assert [(i.call_id, i.name, i.arguments) for i in said.output[2:]] == [
            (c.id, c.name, c.arguments) for c in CALLS
        ]
        assert said.status == "completed"
    played(TextDelta("sunny", 1), done("stop", "sunny", (), ""))
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
    back = [{"role": "user", "content": "Hello."}, *streamed.output, result]
    assert openai.responses.create(model="tiny", input=back).output_text == "sunny"
    kept = openai.responses.create(model="tiny", input=[result], previous_response_id=whole.id)
    assert kept.output_text == "sunny"


def test_errors_reach_openais_client(openai, server, played):
    import openai as package

    for error, wrong in (
        (package.BadRequestError, {"temperature": -1}),
        (package.BadRequestError, {"input": "x" * 2000}),
        (package.BadRequestError, {"input": [{"type": "magic"}]}),
        (package.NotFoundError, {"model": "gpt-9"}),
    ):
        with pytest.raises(error) as e:
            openai.responses.create(**{"model": "tiny", "input": "Hello.", **wrong})
        assert e.value.body["message"]

    def breaks():
        yield TextDelta("so far", 1)
        raise RuntimeError("broken")

    played(*[])
    ChatRequest.events = lambda *_: breaks()  # undone with `played`
    events = list(openai.responses.create(model="tiny", input="Hello.", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message
    server.until(server.idle)


def test_halves_of_characters_come_back_as_something_that_can_be_sent(server):
    body = b'{"input": "x", "instructions": "\\ud83d", "metadata": {"\\ud800": "a"}, "max_output_tokens": 1}'
    status, said, _ = server.ask("/v1/responses", body)
    assert status == 200
    assert said["instructions"] == "\ufffd"


# Answers of a form


BIT = {"type": "object", "properties": {"bit": {"type": "boolean"}}, "required": ["bit"]}
BIT["additionalProperties"] = False


def test_answers_keep_to_a_schema(anthropic, openai):
    import pydantic

    class Bit(pydantic.BaseModel):
        bit: bool

    form = {"format": {"type": "json_schema", "schema": BIT}}
    said = anthropic.messages.create(model="tiny", messages=HELLO, max_tokens=90, output_config=form)
    assert type(json.loads(said.content[0].text)["bit"]) is bool
    parsed = openai.responses.parse(model="tiny", input="Hello.", max_output_tokens=90, text_format=Bit)
    assert type(parsed.output_parsed.bit) is bool
    wrong = {"format": {"type": "json_schema", "schema": {"type": "magic"}}}
    with pytest.raises(Exception, match="400"):
        anthropic.messages.create(model="tiny", messages=HELLO, max_tokens=90, output_config=wrong)


# Tools, from a script to a result


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_an_agent_of_anthropics_calls_a_tool_and_hears_its_result(anthropic, model, monkeypatch):
    says(monkeypatch, model, f"I look. {CALL}", f"I look. {CALL}", "Rain.")
    tools = [{"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}]
    asked = {"model": "tiny", "max_tokens": 100, "tools": tools, "messages": HELLO}
    whole = anthropic.messages.create(**asked, tool_choice={"type": "auto"})
    with anthropic.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for said in (whole, streamed):
        assert [b.type for b in said.content] == ["text", "tool_use"]
        assert (said.content[1].name, said.content[1].input) == ("weather", {"city": "Bern"})
        assert said.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": streamed.content[1].id, "content": "rain"}
    asked["messages"] = [
        *HELLO,
        {"role": "assistant", "content": streamed.content},
        {"role": "user", "content": [result]},
    ]
    counted = anthropic.messages.count_tokens(model="tiny", messages=asked["messages"], tools=tools)
    said = anthropic.messages.create(**asked)
    assert (said.content[0].text, said.stop_reason) == ("Rain.", "end_turn")
    assert said.usage.input_tokens + said.usage.cache_read_input_tokens == counted.input_tokens
    assert said.usage.cache_read_input_tokens > 100  # what was said before is not read again


def test_an_agent_of_openais_calls_a_tool_and_hears_its_result(openai, model, monkeypatch):
    says(monkeypatch, model, f"I look. {CALL}", f"I look. {CALL}", "Rain.")
    tool = {"type": "function", "name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
    asked = {"model": "tiny", "tools": [tool, {"type": "web_search"}], "max_output_tokens": 100}
    whole = openai.responses.create(**asked, input="Hello.", tool_choice="auto")
    with openai.responses.stream(**asked, input="Hello.") as stream:
        streamed = stream.get_final_response()
    for said in (whole, streamed):
        assert [i.type for i in said.output] == ["message", "function_call"]
        assert (said.output[1].name, said.output[1].arguments) == ("weather", '{"city": "Bern"}')
    result = {"type": "function_call_output", "call_id": streamed.output[1].call_id, "output": "rain"}
    said = openai.responses.create(**asked, input=[result], previous_response_id=streamed.id)
    assert (said.output_text, said.status) == ("Rain.", "completed")
    assert said.usage.input_tokens_details.cached_tokens > 100
