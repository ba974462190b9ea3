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
from tinychat.text.calls.objects import Objects
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
END = 257
CHANNELS = ("<|channel|>", "<|message|>", "<|constrain|>")


def tokenizer_of(name: str, marked: bool = True):
    """Every byte a token, and the markers of a syntax, if they are tokens."""
    t = byte_tokenizer(None)
    if not marked:
        return t
    marks = [
        m
        for m in (*SYNTAXES[name].marks, *CHANNELS)
        if m[:1] + m[-1:] in ("<>", "[]") and not set(m) & set("={ \n")
    ]
    t.backend.add_special_tokens(list(dict.fromkeys(marks)))
    return type(t)(t.backend, eos_ids={END})


def written(form, tokenizer, rng: random.Random, most: int = 600) -> str | None:
    """A text that the form allows, by chance; None where it does not end in time."""
    matcher = grammar.matcher(form, tokenizer)
    likely = {*tokenizer.encode('"}])\n>/,ade1'), *tokenizer.markers, END}
    ids: list[int] = []
    while len(ids) < most:
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        weights = [30 if i in likely else 1 if 32 <= i < 127 else 0.01 for i in allowed]
        token = rng.choices(allowed, weights)[0]
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids, skip_special=False)
        matcher.push(token)
        ids.append(token)
    return None


def calls_in(name: str, text: str):
    caller = Caller(SYNTAXES[name], PARAMETERS)
    left = "".join(p.text for p in (*caller.push(text), *caller.flush()) if not p.called)
    return caller.calls, left


@pytest.mark.parametrize("name", sorted(SYNTAXES))
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
            if name == "harmony":  # a thought may go before
                assert re.fullmatch(r"(<\|channel\|>analysis<\|message\|>.*<\|end\|>)?", left, re.DOTALL), (
                    text
                )
                left = ""
            assert not left.strip(), text
            assert several or len(calls) == 1
            for call in calls:
                schema = {**PARAMETERS[call.name], "additionalProperties": False}
                jsonschema.validate(json.loads(call.arguments), schema)
            found += 1
    assert found >= 3


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "name", ["hermes", "qwen-coder", "seed-oss", "minicpm", "mistral", "llama", "gemma-4", "olmo"]
)
def test_strict_tools_leave_words_free_and_hold_calls(name, marked):
    tokenizer = tokenizer_of(name, marked)
    form = form_of_calls(SYNTAXES[name], STRICT, tokenizer, required=False, several=True)

    def fits(text: str) -> bool:
        ids = [*tokenizer.encode(text, special=True), END]
        return grammar.matcher(form, tokenizer).accepts(ids) == len(ids)

    assert fits("An answer: {no} [call]. <b>")
    assert fits("")
    on = SYNTAXES[name].spell([("beta_2", {"on": True})]).replace("True", "true")  # as JSON has it
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


def test_without_its_markers_a_syntax_refuses_required_calls_and_leaves_strict_ones_free():
    plain = tokenizer_of("harmony", marked=False)
    with pytest.raises(UsageError, match="cannot be held"):
        form_of_calls(SYNTAXES["harmony"], TOOLS, plain, True, True)
    assert form_of_calls(SYNTAXES["harmony"], STRICT, plain, False, True) is None


THOUGHT = "<|channel|>analysis<|message|>I think {so}.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.beta_2 <|constrain|>json<|message|>{"on": true}'


@pytest.mark.parametrize(
    ("text", "required", "strict"),
    [
        (CALL, True, True),
        (THOUGHT + CALL, True, True),
        (THOUGHT + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL, False, True),
        (THOUGHT + "<|channel|>final<|message|>An answer.", False, True),
        ("<|channel|>final<|message|>An answer.", False, True),
        (THOUGHT + THOUGHT + CALL, False, False),
        (CALL + CALL, False, False),
        (CALL.replace("rue", "rie"), False, False),
        (CALL.replace("beta_2", "beta_3"), False, False),
        ("An answer.", False, False),
        (THOUGHT, False, False),
    ],
)
def test_channels_are_held_from_the_first_token_on(text, required, strict):
    tokenizer = tokenizer_of("harmony")
    for form, fits in (
        (form_of_calls(SYNTAXES["harmony"], TOOLS, tokenizer, True, True), required),
        (form_of_calls(SYNTAXES["harmony"], STRICT, tokenizer, False, True), strict),
    ):
        assert form.throughout
        ids = [*tokenizer.encode(text, special=True), END]
        assert (grammar.matcher(form, tokenizer).accepts(ids) == len(ids)) == fits


@pytest.mark.parametrize("name", sorted(SYNTAXES))
def test_beside_a_strict_tool_another_may_have_any_arguments(name):
    tokenizer = tokenizer_of(name)
    given = tools([TOOLS[0], STRICT[1]])
    form, matches = form_of_calls(SYNTAXES[name], given, tokenizer, False, True), grammar.matcher
    typed = getattr(SYNTAXES[name], "typed", "")  # what is spelled says types of texts alone
    for arguments in ({"text": "a"}, {"text": "a", "number": 7} if not typed else {}):
        text = SYNTAXES[name].spell([("alpha", arguments)])
        if name == "lfm2":
            text = Objects(("<|tool_call_start|>",), ("<|tool_call_end|>",), listed=True).spell(
                [("alpha", arguments)]
            )
        if name == "llama":
            text = json.dumps({"name": "alpha", "parameters": arguments})
        if name == "harmony":
            text = CALL.replace("beta_2", "alpha").replace('{"on": true}', json.dumps(arguments))
        text = text.replace("'a'", '"a"')  # as JSON, which Python reads too
        ids = [*tokenizer.encode(text, special=True), END]
        assert matches(form, tokenizer).accepts(ids) == len(ids), text


def test_what_python_cannot_name_is_left_out_or_refused():
    schema = {"type": "object", "properties": {"a-b": {"type": "integer"}, "c": {"type": "integer"}}}
    tokenizer = tokenizer_of("olmo")
    form = form_of_calls(
        SYNTAXES["olmo"], tools([{"name": "f", "parameters": schema}]), tokenizer, True, True
    )
    ids = [*tokenizer.encode("<function_calls>\nf(c=1)\n</function_calls>", special=True), END]
    assert grammar.matcher(form, tokenizer).accepts(ids) == len(ids)
    needed = tools([{"name": "f", "parameters": {**schema, "required": ["a-b"]}}])
    with pytest.raises(UsageError, match=r"The tool f: .*'a-b'"):
        form_of_calls(SYNTAXES["olmo"], needed, tokenizer, True, True)


def test_without_strict_and_required_nothing_is_held():
    assert form_of_calls(SYNTAXES["hermes"], TOOLS, tokenizer_of("hermes"), False, True) is None
