"""Calls read by transformers' parser of responses, and here: the same."""

# ruff: noqa: E501 (patterns)
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.text.calls.caller import Caller
from tinychat.text.calls.families import SYNTAXES

PARAMETERS = {
    "text": {"type": "string"},
    "number": {"type": "integer"},
    "list": {"type": "array"},
    "on": {"type": "boolean"},
}
NAMES = ("alpha", "beta_2")
TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object", "properties": PARAMETERS}}}
    for n in NAMES
]


def region(opens: str, closes: str, content: str, **args: Any) -> dict[str, Any]:
    """How transformers is told of a family: a region, what stands in it, and what becomes of that."""
    named = "(?P<name>" in opens
    function = {"name": "{name}", "arguments": "{content}"} if named else "{content}"
    return {
        "open_pattern" if named else "open": opens,
        "close": closes,
        "repeats": True,
        "content": content,
        "content_args": args,
        "transform": {"type": "function", "function": function},
    }


QWEN = r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>"
GLM = r"<arg_key>(?P<key>.*?)</arg_key>\n?<arg_value>(?P<value>.*?)</arg_value>"
MINIMAX = r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>'
THEIRS = {
    "hermes": region("<tool_call>", "</tool_call>", "json"),
    "kimi": region(
        r"<\|tool_call_begin\|>functions\.(?P<name>\w+):\d+<\|tool_call_argument_begin\|>", "<|tool_call_end|>", "json"
    ),
    "deepseek": region(r"<｜tool▁call▁begin｜>(?P<name>\w+)<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "json"),
    "functionary": region(r"<function=(?P<name>\w+)>", "</function>", "json"),
    "gemma-4": region(
        r"<\|tool_call>call:(?P<name>\w+)", "<tool_call|>", "json", unquoted_keys=True, string_delims=[['<|"|>', '<|"|>']]
    ),
    "qwen-coder": region(r"<function=(?P<name>[^>]+)>", "</function>", "xml-inline", tag_pattern=QWEN),
    "glm": region(r"<tool_call>(?P<name>\w+)\n", "</tool_call>", "xml-inline", tag_pattern=GLM),
    "minimax": region(r'<invoke name="(?P<name>[^"]+)">', "</invoke>", "xml-inline", tag_pattern=MINIMAX),
}  # fmt: skip
# Texts that the tags of no family are in: what quotes them is told apart better here (test_families.py).
TEXTS = st.text(st.sampled_from("ab é\"'\\{}[]:,\n😀7"), max_size=12).filter(lambda s: s == s.strip())
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS,
        "number": st.integers(),
        "list": st.lists(TEXTS, max_size=2),
        "on": st.booleans(),
    },
)


def theirs(name: str, text: str) -> list[dict[str, Any]]:
    parse = pytest.importorskip("transformers.utils.chat_parsing").parse_response
    spec = {"version": 1, "start_anchor": "@", "fields": {"content": {}, "tool_calls": THEIRS[name]}}
    return [c["function"] for c in parse(text, spec, prefix="@", tools=TOOLS).get("tool_calls", [])]


@given(st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_calls_are_those_that_transformers_reads(calls):
    expected = [{"name": name, "arguments": arguments} for name, arguments in calls]
    for name in THEIRS:
        text = SYNTAXES[name].spell(calls)
        caller = Caller(SYNTAXES[name], {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS})
        for c in text:
            list(caller.push(c))
        list(caller.flush())
        ours = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in caller.calls]
        assert ours == theirs(name, text) == expected, name
