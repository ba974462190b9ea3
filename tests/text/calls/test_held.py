"""Answers that are held to calls: whatever is written within the grammar is a call that fits its schema."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from tiny import byte_tokenizer

from tinychat.base.errors import UsageError
from tinychat.base.tools import tools
from tinychat.text import grammar
from tinychat.text.calls.caller import Caller
from tinychat.text.calls.families import SYNTAXES
from tinychat.text.calls.held import form_of_calls
from tinychat.text.response_format import of_schema

ALPHA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "integer"},
        "list": {"type": "array", "items": {"type": "string"}},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["text", "number", "unit"],
}
PARAMETERS = {
    "alpha": ALPHA,
    "beta_2": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    "gamma": {"type": "object", "properties": {}},
}
TOOLS = tools([{"name": name, "parameters": p} for name, p in PARAMETERS.items()])
STRICT = tools([{"name": name, "parameters": p, "strict": True} for name, p in PARAMETERS.items()])
FREE = {"harmony", "olmo"}  # cannot be held
END = 257


def tokenizer_of(name: str, marked: bool = True):
    """Every byte a token, and the markers of a syntax, if they are tokens."""
    t = byte_tokenizer(None)
    if not marked:
        return t
    marks = [m for m in SYNTAXES[name].marks if m[:1] + m[-1:] in ("<>", "[]") and not set(m) & set("={ \n")]
    t.backend.add_special_tokens(list(dict.fromkeys(marks)))
    return type(t)(t.backend, eos_ids={END})


def written(form, tokenizer, rng: random.Random, most: int = 600) -> str | None:
    """A text that the form allows, by chance; None where it does not end in time."""
    matcher = grammar.matcher(form, tokenizer)
    likely = {*tokenizer.encode('"}]\n>/,ade1'), *tokenizer.markers, END}
    ids: list[int] = []
    while len(ids) < most:
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        weights = [30 if i in likely else 1 if 32 <= i < 127 else 0.01 for i in allowed]
        token = rng.choices(allowed, weights)[0]
        if token == END:
            return tokenizer.decode(ids, skip_special=False)
        matcher.push(token)
        ids.append(token)
    return None


def calls_in(name: str, text: str):
    caller = Caller(SYNTAXES[name], PARAMETERS)
    left = "".join(p.text for p in (*caller.push(text), *caller.flush()) if not p.called)
    return caller.calls, left


@pytest.mark.parametrize("name", sorted(set(SYNTAXES) - FREE))
def test_whatever_is_written_where_a_call_is_required_is_one_that_fits(name):
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer, rng = tokenizer_of(name), random.Random(1)
    found = 0
    for several in (True, False):
        form = form_of_calls(SYNTAXES[name], TOOLS, tokenizer, required=True, several=several)
        for _ in range(3):
            if (text := written(form, tokenizer, rng)) is None:
                continue
            calls, left = calls_in(name, text)
            assert calls
            assert not left.strip(), text
            assert several or len(calls) == 1
            for call in calls:
                schema = {**PARAMETERS[call.name], "additionalProperties": False}
                jsonschema.validate(json.loads(call.arguments), schema)
            found += 1
    assert found >= 3


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "name", ["hermes", "qwen-coder", "seed-oss", "minicpm", "mistral", "llama", "gemma-4"]
)
def test_strict_tools_leave_words_free_and_hold_calls(name, marked):
    tokenizer = tokenizer_of(name, marked)
    form = form_of_calls(SYNTAXES[name], STRICT, tokenizer, required=False, several=True)

    def fits(text: str) -> bool:
        ids = [*tokenizer.encode(text, special=True), END]
        return grammar.matcher(form, tokenizer).accepts(ids) == len(ids)

    assert fits("An answer: {no} [call]. <b>")
    assert fits("")
    on = SYNTAXES[name].spell([("beta_2", {"on": True})])
    if name == "llama":
        on = '{"name": "beta_2", "parameters": {"on": true}}'
    assert fits(on)
    for damaged in (on.replace("rue", "ree"), on.replace("beta_2", "beta_3"), re.sub(r"\bon\b", "off", on)):
        assert damaged != on
        assert not fits(damaged)
    assert fits(f"I call.\n{on}")  # Llama's are words there, and no call


def test_an_answer_is_of_its_form_or_calls():
    form, tokenizer = (
        of_schema({"type": "object", "properties": {"x": {"type": "integer"}}}),
        tokenizer_of("hermes"),
    )
    held = form_of_calls(SYNTAXES["hermes"], TOOLS, tokenizer, False, True, form)
    for text, fits in (('{"x": 1}', True), ("x", False), (SYNTAXES["hermes"].spell([("gamma", {})]), True)):
        ids = [*tokenizer.encode(text, special=True), END]
        assert (grammar.matcher(held, tokenizer).accepts(ids) == len(ids)) == fits


def test_a_schema_that_cannot_be_held_to_is_said_with_its_tool():
    bad = {"type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)"}}}
    for given in (
        tools([{"name": "f", "parameters": bad}]),
        [*TOOLS, *tools([{"name": "f", "parameters": bad}])],
    ):
        with pytest.raises(UsageError, match=r"The tool f: .*#/properties/x") as e:
            form_of_calls(SYNTAXES["hermes"], given, tokenizer_of("hermes"), True, True)
        assert e.value.todo


def test_a_syntax_that_cannot_be_held_refuses_required_calls_and_leaves_strict_ones_free():
    for name in FREE:
        with pytest.raises(UsageError, match="cannot be held"):
            form_of_calls(SYNTAXES[name], TOOLS, tokenizer_of(name), True, True)
        assert form_of_calls(SYNTAXES[name], STRICT, tokenizer_of(name), False, True) is None


def test_without_strict_and_required_nothing_is_held():
    assert form_of_calls(SYNTAXES["hermes"], TOOLS, tokenizer_of("hermes"), False, True) is None
