"""Anthropic's and OpenAI's newer API without a server: what is asked in our words, the answer in theirs."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from answers import ARGUMENTS, CALLS, EVENTS, done
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import events_of
from tiny import byte_tokenizer

from tinychat.base.events import TextDelta, ToolCallDelta
from tinychat.serve import anthropic, response_form, responses
from tinychat.serve.blocks import Blocks, blocks_of, message_of
from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError


class Said:
    """An answer whose events are known."""

    model = SimpleNamespace(tokenizer=byte_tokenizer())

    def __init__(self, *events):
        self._events = events

    async def events(self):
        for event in self._events:
            yield 0, event


def whole(form, *events):
    return asyncio.run(form.whole(Said(*events)))


def streamed(form, *events):
    async def collect():
        return b"".join([chunk async for chunk in form.events(Said(*events))])

    return events_of(asyncio.run(collect()))


# Anthropic's


def test_a_message_has_its_thought_its_text_and_its_calls():
    made = whole(anthropic.Form("tiny"), *EVENTS, done())
    assert made.pop("id").startswith("msg_")
    assert made == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [
            {"type": "thinking", "thinking": "Let me think.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris", "days": 2}},
            {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 16,
            "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 3},
        },
    }


def test_a_streamed_message_opens_one_block_at_a_time():
    made = streamed(anthropic.Form("tiny"), *EVENTS, done())
    kinds = [e["type"].removeprefix("content_block_") for e in made]
    assert kinds == [
        "message_start",
        *("start", "delta", "delta", "delta", "stop"),  # the thought, its signature last
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        "message_delta",
        "message_stop",
    ]
    assert made[0]["message"]["content"] == []
    starts = [e for e in made if e["type"] == "content_block_start"]
    assert [e["index"] for e in starts] == [0, 1, 2, 3]
    assert starts[2]["content_block"] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}
    parts = [e["delta"]["partial_json"] for e in made if e.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(parts) == ARGUMENTS + "{}"
    assert made[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert made[-2]["usage"]["cache_read_input_tokens"] == 16


@pytest.mark.parametrize(
    ("reason", "more", "expected"),
    [
        ("stop", {}, ("end_turn", None)),
        ("length", {}, ("max_tokens", None)),
        ("stop", {"stop": "END"}, ("stop_sequence", "END")),
        ("context_full", {}, ("model_context_window_exceeded", None)),
    ],
)
def test_why_a_message_ended(reason, more, expected):
    made = whole(anthropic.Form("tiny"), done(reason, "x", (), "", **more))
    assert (made["stop_reason"], made["stop_sequence"]) == expected
    assert made["content"] == [{"type": "text", "text": "x"}]


def asked(**body):
    return anthropic.Asked.of(Fields({"max_tokens": 5, "messages": [], **body}))


def test_what_a_client_of_anthropics_asks():
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Zürich"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "gone", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
                {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "a page"},
                },
            ],
        },
    ]
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    made = asked(system=system, messages=messages, stop_sequences=["END"], temperature=0.5, top_k=3)
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    assert made.messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: gone"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "And?\n\na page"},
    ]
    assert made.options == {"max_tokens": 5, "stop": ("END",), "temperature": 0.5, "top_k": 3}


def test_tools_thought_and_form_in_our_words():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"name": "weather", "description": "Tells.", "input_schema": schema},
        {"type": "web_search_20250305", "name": "web_search"},  # only Anthropic's servers run it
    ]
    fields = Fields({"tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    function = {"name": "weather", "description": "Tells.", "parameters": schema}
    assert anthropic._tools(fields) == {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    named = Fields({"tools": tools, "tool_choice": {"type": "tool", "name": "weather"}})
    assert anthropic._tools(named)["tool_choice"] == "weather"
    form = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert anthropic._thought(Fields({"thinking": thinking, "output_config": form})) == {
        "think": True,
        "think_budget": 1024,
        "effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }
    assert anthropic._thought(Fields({"thinking": {"type": "disabled"}})) == {"think": False}


HELLO = [{"role": "user", "content": "Hello."}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": None, "messages": HELLO},
        {"max_tokens": 0, "messages": HELLO},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "x"}]}]},
        {"messages": [*HELLO, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "assistant", "content": "I begin"}]},
        {"messages": HELLO, "system": [IMAGE]},
        {"messages": HELLO, "stop_sequences": "x"},
        {"messages": HELLO, "stop_sequences": [""]},
        {"messages": HELLO, "tools": {"x": 1}},
        {"messages": HELLO, "tools": [{"name": "x"}], "tool_choice": {"type": "magic"}},
        {"messages": HELLO, "tools": [{"name": "x"}], "tool_choice": {"type": {"a": 1}}},
        {"messages": HELLO, "thinking": {"type": "magic"}},
        {"messages": HELLO, "temperature": -1},
    ],
)
def test_what_anthropics_api_does_not_take_is_refused(body):
    with pytest.raises(ApiError) as e:
        asked(**body)
    assert e.value.status == 400
    assert anthropic.error_of(e.value)["error"]["type"] == "invalid_request_error"


def test_errors_have_anthropics_names():
    kinds = {404: "not_found_error", 408: "invalid_request_error", 413: "request_too_large"}
    kinds |= {429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}
    for status, kind in kinds.items():
        made = anthropic.error_of(ApiError(status, "What."))
        assert made == {"type": "error", "error": {"type": kind, "message": "What."}}


# OpenAI's responses


def test_a_response_has_its_items_and_is_kept():
    kept = []
    form = response_form.Form("tiny", {"store": True}, lambda r, m: kept.append((r, m)))
    made = whole(form, *EVENTS, done())
    assert made["status"] == "completed"
    assert [i["type"] for i in made["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert made["output"][1]["content"][0]["text"] == "I look."
    call = made["output"][2]
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "weather", ARGUMENTS)
    assert len({i["id"] for i in made["output"]}) == 4
    assert made["usage"]["input_tokens_details"] == {"cached_tokens": 16}
    assert made["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    ((response, message),) = kept
    assert response == made
    assert message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Let me think.",
        "tool_calls": [c.as_dict() for c in CALLS],
    }


def test_a_streamed_response_tells_the_same():
    form = response_form.Form("tiny", {})
    made = streamed(form, *EVENTS, done())
    assert [e["sequence_number"] for e in made] == list(range(len(made)))
    assert [e["type"].removeprefix("response.") for e in made[:4]] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
    ]
    assert made[-1]["type"] == "response.completed"
    output = made[-1]["response"]["output"]
    assert output == [e["item"] for e in made if e["type"] == "response.output_item.done"]
    for kind, index, text in (("reasoning_text", 0, "Let me think."), ("output_text", 1, "I look.")):
        deltas = [e for e in made if e["type"] == f"response.{kind}.delta"]
        assert "".join(e["delta"] for e in deltas) == text
        assert {e["item_id"] for e in deltas} == {output[index]["id"]}
    arguments = [e["delta"] for e in made if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == ARGUMENTS + "{}"


def test_a_response_that_was_cut_is_incomplete():
    made = streamed(response_form.Form("t", {}), TextDelta("a", 1), done("length", "a", (), ""))
    assert made[-1]["type"] == "response.incomplete"
    assert made[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made[-1]["response"]["output"][0]["status"] == "incomplete"
    assert whole(response_form.Form("t", {}), done("length", "", (), ""))["output"] == []


def test_what_a_client_of_responses_asks():
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"role": "user", "content": "And?"},
    ]
    made = responses.Asked.of(Fields({"input": items, "instructions": "Be brief."}), responses.Kept())
    assert responses._merged(made.instructions, made.messages) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "user", "content": "And?"},
    ]
    tools = [{"type": "function", "name": "f", "parameters": {}, "strict": True}, {"type": "web_search"}]
    choice = {"type": "function", "name": "f"}
    assert responses._tools(Fields({"tools": tools, "tool_choice": choice})) == {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
        "tool_choice": "f",
    }
    schema = {"name": "x", "schema": {}, "strict": True}
    form = {"format": {"type": "json_schema", **schema}}
    assert responses._form(Fields({"text": form, "reasoning": {"effort": "low"}})) == {
        "effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {}, "strict": True},
        },
    }


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": 5},
        {"input": [5]},
        {"input": [{"type": "magic"}]},
        {"input": [{"role": "wizard", "content": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"type": "function_call", "name": "x"}]},
        {"input": [{"type": "function_call_output", "output": "x"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": "x", "previous_response_id": "resp_none"},
        {"input": "x", "background": True},
        {"input": "x", "conversation": "c"},
        {"input": "x", "tools": 5},
        {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "web_search"}},
        {"input": "x", "text": {"format": {"type": "magic"}}},
        {"input": "x", "max_output_tokens": 0},
        {"input": "x", "instructions": 5},
    ],
)
def test_what_the_responses_api_does_not_take_is_refused(body):
    with pytest.raises(ApiError) as e:
        responses.Asked.of(Fields(body), responses.Kept())
    assert e.value.status == 400


def test_responses_are_kept_within_bounds():
    kept = responses.Kept(most=3, characters=1000)
    for i in range(5):
        kept.add(f"r{i}", [{"role": "user", "content": "x"}], {"id": f"r{i}"})
    assert kept.messages("r2")  # which is now the newest
    kept.add("r5", [{"role": "user", "content": "x" * 500}], {})
    kept.add("large", [{"role": "user", "content": "x" * 5000}], {})
    for gone in ("r0", "r1", "r3", "large"):
        with pytest.raises(ApiError):
            kept.messages(gone)
    assert [kept.response(i)["id"] for i in ("r2", "r4")] == ["r2", "r4"]
    kept.add("echo", [{"role": "user", "content": "x"}], {"id": "echo", "tools": ["x" * 5000]})
    with pytest.raises(ApiError):
        kept.response("echo")
    kept.add("r6", [{"role": "user", "content": "x" * 500}], {})
    with pytest.raises(ApiError):
        kept.response("r5")
    kept.drop("r6")
    assert kept._size == sum(size for _, _, size in kept._kept.values())
    with pytest.raises(ApiError):
        kept.drop("r6")


# Both


def test_a_call_that_turns_out_to_be_none_ends_its_block():
    blocks = Blocks()
    events = [
        ToolCallDelta(0, "c", "f", '{"a'),
        ToolCallDelta(0, damaged=True),
        TextDelta("<tool>", 1),
        ToolCallDelta(0, "d", "g"),
        ToolCallDelta(0, arguments="{}"),
    ]
    steps = [s for e in events for s in blocks.hear(e)] + list(blocks.end())
    kinds = [(s.what, s.block.kind) for s in steps if s.what != "more"]
    assert kinds == [(what, kind) for kind in ("call", "text", "call") for what in ("begin", "end")]
    assert [b.text for b in blocks.all] == ['{"a', "<tool>", "{}"]


TEXTS = st.text(max_size=3)
DELTAS = st.lists(
    st.builds(TextDelta, TEXTS, st.none(), TEXTS)
    | st.builds(lambda t: ToolCallDelta(0, arguments=t), TEXTS)
    | st.builds(lambda i, t: ToolCallDelta(i, f"c{i}", "f", t), st.integers(0, 3), TEXTS)
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(DELTAS)
def test_blocks_hold_all_that_was_said_in_its_order(events):
    blocks, out, open_block = Blocks(), [], None
    for step in [s for e in events for s in blocks.hear(e)] + list(blocks.end()):
        if step.what == "begin":
            assert open_block is None
            open_block = step.block
        assert step.block is open_block
        if step.what == "more":
            assert step.text
            out.append(step.text)
        if step.what == "end":
            open_block = None
    assert open_block is None
    assert [b.index for b in blocks.all] == list(range(len(blocks.all)))
    said = (e.arguments if isinstance(e, ToolCallDelta) else e.reasoning + e.text for e in events)
    assert "".join(out) == "".join(b.text for b in blocks.all) == "".join(said)


def test_an_answer_comes_back_as_it_was():
    completion = done().completion
    assert message_of(blocks_of(completion)) == completion.message()
    made = whole(anthropic.Form("tiny"), done())
    (back,) = anthropic._messages([{"role": "assistant", "content": made["content"]}])
    assert back == completion.message()
    items = json.loads(json.dumps(whole(response_form.Form("tiny", {}), done())["output"]))
    (back,) = responses._input(items)
    assert back == completion.message()
