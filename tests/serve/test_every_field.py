"""Every field of each API, and every part of a request, at wrong types and extreme values: an error in words,
or an answer, and never a fault of the server's.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Served, serving
from tiny import tiny_model

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "Hello."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 5},
        "b": {"type": "array", "items": {"$ref": "#/$defs/x"}},
    },
    "required": ["a"],
    "$defs": {"x": {"type": "integer", "minimum": 1}},
}
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, 10**30, -(10**30), 2**31, 2**63, "", "x",
    "\ud800", "\0", "a" * 100_000, "1", "auto", "none", "required", "system", "assistant", "tool",
    "developer", "$ref", "#", "<|im_end|>", [], [1], [[]], [None], ["x"], ["x"] * 300, [{}], {}, {"a": 1},
    {"type": "x"}, {"": ""}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema":
    {"type": "nope"}}}, {"effort": 3}, {"format": 3}, {"type": "tool"}, {"$ref": "#"}, {"not": {}}, {"enum":
    []}, {"type": "string", "pattern": "(a+)+$"}, {"1": 1}, {"-1": 5}, {"1": "x"}, {"type": "image_url",
    "image_url": {"url": "http://x"}}, {"include_usage": "x"}, {"type": "function", "name": "add"},
]  # fmt: skip
FUNCTION = {"name": "add", "description": "d", "strict": True, "parameters": SCHEMA}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": "x"}'}}
CHAT = {
    "model": "tiny", "max_tokens": 4, "logit_bias": {"5": 1}, "stop": ["q"], "n": 1, "presence_penalty": 1,
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text":
    "x"}]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id":
    "c", "content": "r"}, {"role": "assistant", "content": "On", "reasoning_content": "t"}],
    "continue_final_message": True, "add_generation_prompt": False, "tools": [{"type": "function",
    "function": FUNCTION}], "stream_options": {"include_usage": True}, "chat_template_kwargs":
    {"enable_thinking": True}, "top_k": 3,
}  # fmt: skip
HELD = {
    "model": "tiny", "max_tokens": 4, "messages": HELLO, "logprobs": True, "top_logprobs": 3, "seed": 1,
    "top_p": 0.9, "temperature": 1, "frequency_penalty": -1, "repeat_penalty": 1.1, "min_p": 0.1,
    "think_budget": 3, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict":
    True, "schema": SCHEMA}}, "reasoning_effort": "low", "tool_choice": "auto", "parallel_tool_calls": True,
}  # fmt: skip
TEXT = {
    "model": "tiny", "max_tokens": 4, "prompt": ["Once", [1, 2]], "logprobs": 2, "echo": False, "suffix":
    "", "n": 1, "stop": "q", "seed": 1, "best_of": 1, "presence_penalty": 0.5, "logit_bias": {"5": 1},
}  # fmt: skip
RESPONSE = {
    "model": "tiny", "max_output_tokens": 4, "instructions": "i", "metadata": {"a": "b"}, "temperature": 1,
    "store": True, "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, {"type":
    "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, {"type": "function_call", "call_id":
    "c", "name": "add", "arguments": "{}"}, {"type": "function_call_output", "call_id": "c", "output":
    "r"}], "tools": [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}],
    "reasoning": {"effort": "low"}, "tool_choice": {"type": "function", "name": "add"},
    "previous_response_id": None, "background": False, "text": {"format": {"type": "json_schema", "name":
    "x", "schema": SCHEMA}}, "parallel_tool_calls": False,
}  # fmt: skip
MESSAGE = {
    "model": "tiny", "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["q"],
    "top_k": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type":
    "document", "source": { "type": "text", "media_type": "text/plain", "data": "d"}}]}, {"role":
    "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""}, {"type": "tool_use",
    "id": "c", "name": "add", "input": {"a": "x"}}]}, {"role": "user", "content": [{"type": "tool_result",
    "tool_use_id": "c", "content": [ {"type": "text", "text": "r"}], "is_error": False}]}], "tools":
    [{"name": "add", "description": "d", "input_schema": SCHEMA, "strict": True}], "tool_choice": {"type":
    "tool", "name": "add", "disable_parallel_tool_use": True}, "thinking": {"type": "enabled",
    "budget_tokens": 1024}, "output_config": {"effort": "low", "format": {"type": "json_schema", "schema":
    SCHEMA}},
}  # fmt: skip
REQUESTS = [
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", HELD), ("/v1/completions", TEXT),
    ("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE), ("/v1/messages/count_tokens", MESSAGE),
    ("/tokenize", {"content": "x", "model": "tiny"}), ("/tokenize", {"messages": HELLO}), ("/detokenize",
    {"tokens": [1, 2], "model": "tiny"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with tiny_model(ctx=4096, backend="cpu", eos_ids=(), context_length=4096) as model, serving(model) as s:
        yield s


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where something stands in a request."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def changed(body: Any, at: tuple, value: Any) -> Any:
    """The request with another value there."""
    body = copy.deepcopy(body)
    inner = body
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return body


def bears(server: Served, path: str, body: Any) -> int:
    """Ask, and see that it is an answer or an error of the client's, in words; the status."""
    status, said, _ = server.ask(path, json.dumps(body).encode())
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    assert status < 500, (path, body, said)
    assert b"Internal error" not in text, (path, body, said)
    return status


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_field_may_be_anything(server, path, body):
    assert bears(server, path, body) == 200
    for field in body:
        for i, value in enumerate(VALUES):
            stream = {"stream": True} if i % 2 and path.startswith("/v1") else {}
            bears(server, path, {**body, **stream, field: value})
    server.until(server.idle)


@pytest.mark.parametrize("seed", range(8))
def test_every_part_of_a_request_may_be_anything(server, seed):
    rng, statuses = random.Random(seed), set()
    for _ in range(300):
        path, body = rng.choice(REQUESTS)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            body = changed(body, rng.choice(list(places(body)) or [("x",)]), rng.choice(VALUES))
        if isinstance(body, dict) and rng.random() < 0.4:
            body = {**body, "stream": True}
        statuses.add(bears(server, path, body))
    assert {200, 400} <= statuses
    server.until(server.idle)
