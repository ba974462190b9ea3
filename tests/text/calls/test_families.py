"""Calls of tools as each family writes them, read whole, byte by byte, and in any cuts."""

# ruff: noqa: E501 (what models write is longer than a line)

from __future__ import annotations

import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinychat.text.calls.caller import Caller
from tinychat.text.calls.families import SYNTAXES

PARAMETERS = {
    "text": {"type": "string"},
    "number": {"type": "integer"},
    "list": {"type": "array"},
    "on": {"type": "boolean"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
TOOLS = {name: {"type": "object", "properties": PARAMETERS} for name in ("alpha", "beta_2")}
ONE, TWO = ("alpha", {"text": "a b", "number": 7, "list": ["c", "d"]}), ("beta_2", {"on": True})
EMPTY = ("alpha", {})

# What a template of the family writes, or its documentation says: text, calls, and the text that is left.
WRITTEN = {
    "hermes": [
        ('<tool_call>\n{"name": "alpha", "arguments": {"text": "a b", "number": 7, "list": ["c", "d"]}}\n'
         '</tool_call>\n<tool_call>\n{"name": "beta_2", "arguments": {"on": true}}\n</tool_call>', [ONE, TWO], ""),
        ('Let me see.\n<tool_call>\n{"name": "alpha", "arguments": {}}\n</tool_call>', [EMPTY], "Let me see."),
        ('<think>\nhm <tool_call> is a word\n</think>\n\n<tool_call>{"arguments": {"on": true}, "name": "beta_2"}'
         "</tool_call>", [TWO], "<think>\nhm <tool_call> is a word\n</think>"),
        ('<tool_call>{"name": "beta_2", "arguments": "{\\"on\\": true}"}</tool_call>', [TWO], ""),
        ('<tool_call>{"name": "alpha"}</tool_call> done', [EMPTY], " done"),
        ('<tool_call>{"name": "alpha", "arguments": null}', [EMPTY], ""),
    ],
    "qwen-coder": [
        ("<tool_call>\n<function=alpha>\n<parameter=text>\na b\n</parameter>\n<parameter=number>\n7\n</parameter>\n"
         '<parameter=list>\n["c", "d"]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=beta_2>\n'
         "<parameter=on>\ntrue\n</parameter>\n</function>\n</tool_call>", [ONE, TWO], ""),
        ("I look.\n\n<tool_call>\n<function=alpha>\n</function>\n</tool_call>", [EMPTY], "I look."),
        ("<function=beta_2>\n<parameter=on>\nTrue\n</parameter>\n</function>\n</tool_call>", [TWO], ""),
        ("<tool_call>\n<function=alpha>\n<parameter=text>\n\n a\n</parameter> b\n\n</parameter>\n</function>",
         [("alpha", {"text": "\n a\n</parameter> b\n"})], ""),
        ("<tool_call><function=alpha><parameter=text>7</parameter><parameter=maybe>null</parameter></function>"
         "</tool_call>", [("alpha", {"text": "7", "maybe": None})], ""),
    ],
    "seed-oss": [
        ("<seed:tool_call>\n<function=alpha>\n<parameter=text>a b</parameter>\n<parameter=number>7</parameter>\n"
         "<parameter=list>['c', 'd']</parameter>\n</function>\n</seed:tool_call>", [ONE], ""),
    ],
    "glm": [
        ("\n<tool_call>alpha\n<arg_key>text</arg_key>\n<arg_value>a b</arg_value>\n<arg_key>number</arg_key>\n"
         '<arg_value>7</arg_value>\n<arg_key>list</arg_key>\n<arg_value>["c", "d"]</arg_value>\n</tool_call>',
         [ONE], ""),
        ("<tool_call>beta_2<arg_key>on</arg_key><arg_value>true</arg_value></tool_call><tool_call>alpha</tool_call>",
         [TWO, EMPTY], ""),
    ],
    "hunyuan": [
        ("<tool_calls:opensource>\n<tool_call:opensource>beta_2<tool_sep:opensource>\n<arg_key:opensource>on"
         "</arg_key:opensource>\n<arg_value:opensource>true</arg_value:opensource>\n</tool_call:opensource>\n"
         "<tool_call:opensource>alpha<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
         [TWO, EMPTY], ""),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "alpha", "arguments": {"text": "a b", "number": 7, "list": ["c", "d"]}, "id": '
         '"abcdefghi"}, {"name": "beta_2", "arguments": {"on": true}, "id": "abcdefghj"}]', [ONE, TWO], ""),
        ('[TOOL_CALLS]alpha[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]beta_2[CALL_ID]abcdefghj[ARGS]{"on": true}',
         [EMPTY, TWO], ""),
        ('[THINK]hm[/THINK]Now.[TOOL_CALLS]beta_2[ARGS]{"on": true}', [TWO], "[THINK]hm[/THINK]Now."),
        ('[TOOL_CALLS]beta_2{"on": true}', [TWO], ""),
    ],
    "deepseek": [
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>alpha\n```json\n{}\n```<｜tool▁call▁end｜>\n"
         '<｜tool▁call▁begin｜>function<｜tool▁sep｜>beta_2\n```json\n{"on": true}\n```<｜tool▁call▁end｜>'
         "<｜tool▁calls▁end｜>", [EMPTY, TWO], ""),
        ("So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>alpha<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁call▁begin｜>beta_2"
         '<｜tool▁sep｜>{"on": true}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [EMPTY, TWO], "So."),
    ],
    "deepseek-3.2": [
        ('\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="alpha">\n<｜DSML｜parameter name="text" string="true">a b'
         '</｜DSML｜parameter>\n<｜DSML｜parameter name="number" string="false">7</｜DSML｜parameter>\n<｜DSML｜parameter '
         'name="list" string="false">["c", "d"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="beta_2">\n'
         '<｜DSML｜parameter name="on" string="false">true</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
         "</｜DSML｜function_calls>", [ONE, TWO], ""),
    ],
    "kimi": [
        ("<|tool_calls_section_begin|><|tool_call_begin|>functions.alpha:0<|tool_call_argument_begin|>{}"
         '<|tool_call_end|><|tool_call_begin|>functions.beta_2:1<|tool_call_argument_begin|>{"on": true}'
         "<|tool_call_end|><|tool_calls_section_end|>", [EMPTY, TWO], ""),
    ],
    "harmony": [
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.beta_2<|channel|>commentary json"
         '<|message|>{"on": true}', [TWO], "<|channel|>analysis<|message|>hm<|end|>"),
        ('<|channel|>commentary to=functions.beta_2 <|constrain|>json<|message|>{"on": true}<|call|>', [TWO], ""),
        (' to=functions.beta_2<|channel|>commentary json<|message|>{"on": true}', [TWO], ""),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.alpha"
         " <|constrain|>json<|message|>{}", [EMPTY], "<|channel|>commentary<|message|>I look.<|end|>"),
    ],
    "gemma-4": [
        ('<|tool_call>call:alpha{list:[<|"|>c<|"|>,<|"|>d<|"|>],number:7,text:<|"|>a b<|"|>}<tool_call|>'
         "<|tool_call>call:beta_2{on:true}<tool_call|>", [ONE, TWO], ""),
        ('<|tool_call>call:alpha{text:<|"|>"}{<|"|>,maybe:null}<tool_call|>',
         [("alpha", {"text": '"}{', "maybe": None})], ""),
        ('<|tool_call>call:alpha{list:[{<|"|>k<|"|>:[-1.5,{}]}]}', [("alpha", {"list": [{"k": [-1.5, {}]}]})], ""),
    ],
    "functiongemma": [
        ("<start_function_call>call:alpha{text:<escape>a b<escape>,number:7,list:[<escape>c<escape>,<escape>d"
         "<escape>]}<end_function_call>", [ONE], ""),
    ],
    "minimax": [
        ('\n<minimax:tool_call>\n<invoke name="alpha">\n<parameter name="text">a b</parameter>\n<parameter '
         'name="number">7</parameter>\n<parameter name="list">["c", "d"]</parameter>\n</invoke>\n<invoke '
         'name="beta_2">\n<parameter name="on">true</parameter>\n</invoke>\n</minimax:tool_call>', [ONE, TWO], ""),
    ],
    "muse": [
        ('<atem:function_calls>\n<atem:invoke name="beta_2">\n<atem:parameter name="on">true</atem:parameter>\n'
         "</atem:invoke>\n</atem:function_calls>", [TWO], ""),
    ],
    "minicpm": [
        ('<function name="alpha"><param name="text"><![CDATA[a\n<b>]]></param></function>\n<function name="beta_2">'
         '<param name="on">True</param></function>', [("alpha", {"text": "a\n<b>"}), TWO], ""),
    ],
    "kimi-3": [
        ('<|open|>tools<|sep|><|open|>call tool="alpha" index="1"<|sep|><|open|>argument key="text" type="string"'
         '<|sep|>a b<|close|>argument<|sep|><|open|>argument key="number" type="number"<|sep|>7<|close|>argument'
         '<|sep|><|close|>call<|sep|><|open|>call tool="beta_2" index="2"<|sep|><|open|>argument key="on" type='
         '"boolean"<|sep|>true<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
         [("alpha", {"text": "a b", "number": 7}), TWO], ""),
    ],
    "lfm2": [
        ("<|tool_call_start|>[alpha(text='a b', number=7, list=['c', 'd']), beta_2(on=True)]<|tool_call_end|>I look.",
         [ONE, TWO], "I look."),
        ('<|tool_call_start|>[{"name": "beta_2", "arguments": {"on": true}}]<|tool_call_end|>', [TWO], ""),
        ("<|tool_call_start|>[alpha()]<|tool_call_end|>", [EMPTY], ""),
        ("<|tool_call_start|>[alpha(text=\"it's\\n(1, 2)]\", list=[(1, -2.5), {'k': None}])]<|tool_call_end|>",
         [("alpha", {"text": "it's\n(1, 2)]", "list": [[1, -2.5], {"k": None}]})], ""),
    ],
    "olmo": [
        ("<function_calls>\nalpha(text=\"a b\", number=7, list=[\"c\", \"d\"])\nbeta_2(on=true)\n</function_calls>",
         [ONE, TWO], ""),
    ],
    "granite-3": [
        ('<|tool_call|>[{"name": "alpha", "arguments": {}}, {"name": "beta_2", "arguments": {"on": true}}]',
         [EMPTY, TWO], ""),
    ],
    "command": [
        ('<|START_THINKING|>hm<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "alpha", '
         '"parameters": {}},\n    {"tool_call_id": "1", "tool_name": "beta_2", "parameters": {"on": true}}\n]'
         "<|END_ACTION|>", [EMPTY, TWO], "<|START_THINKING|>hm<|END_THINKING|>"),
    ],
    "command-r": [
        ('Action:\n```json\n[\n    {\n        "tool_name": "beta_2",\n        "parameters": {\n            "on": true\n'
         "        }\n    }\n]```", [TWO], ""),
    ],
    "apertus": [
        ('<|tools_prefix|>[{"alpha": {}}, {"beta_2": {"on": true}}]<|tools_suffix|>', [EMPTY, TWO], ""),
    ],
    "nemotron": [('<TOOLCALL>[{"name": "beta_2", "arguments": {"on": true}}]</TOOLCALL>', [TWO], "")],
    "tool-calls": [
        ('\n<tool_calls>[{"name": "beta_2", "arguments": {"on": true}}]</tool_calls>', [TWO], ""),
        ('<tool_calls>\n{"name": "alpha", "arguments": {}}\n{"name": "beta_2", "arguments": {"on": true}}\n'
         "</tool_calls>", [EMPTY, TWO], ""),
    ],
    "gigachat": [('<|function_call|>{"name": "beta_2", "arguments": {"on": true}}', [TWO], "")],
    "functionary": [
        ('<function=alpha>{}</function><function=beta_2>{"on": true}</function>', [EMPTY, TWO], ""),
    ],
    "solar": [
        ("<|tool_calls|><|tool_call:begin|>abcdefghij<|tool_call:name|>beta_2<|tool_call:args|>"
         '{"on": true}<|tool_call:end|>', [TWO], ""),
    ],
    "llama": [
        ('{"name": "beta_2", "parameters": {"on": true}}', [TWO], ""),
        ('\n<|python_tag|>{"name": "beta_2", "parameters": {"on": true}}', [TWO], ""),
        ('{"type": "function", "name": "alpha", "parameters": {}}; {"name": "beta_2", "parameters": {"on": true}}',
         [EMPTY, TWO], ""),
        ('<|python_tag|>alpha.call(text="a b")', [("alpha", {"text": "a b"})], ""),
        ("[alpha(), beta_2(on=True)]", [EMPTY, TWO], ""),
        ('I write {"name": "alpha", "parameters": {}}', [], 'I write {"name": "alpha", "parameters": {}}'),
        ('{"name": "gamma", "parameters": {}}', [], '{"name": "gamma", "parameters": {}}'),
        ('{"title": "a", "x": [1]}', [], '{"title": "a", "x": [1]}'),
        ("[1] A note (see [2]).", [], "[1] A note (see [2])."),
    ],
}  # fmt: skip
WRITTEN["mistral-list"] = WRITTEN["mistral"][:1]
WRITTEN["deepseek-r1"] = WRITTEN["deepseek"][:1]
WRITTEN["deepseek-4"] = [
    (text.replace("function_calls", "tool_calls"), calls, left)
    for text, calls, left in WRITTEN["deepseek-3.2"]
]
EACH = [(name, *case) for name, cases in WRITTEN.items() for case in cases]


def read(name: str, pieces: list[str], tools: dict = TOOLS):
    """Calls, text that is none, all that was written, and the deltas, of an answer that comes in pieces."""
    caller = Caller(SYNTAXES[name], tools)
    said = ""
    caller.begins = lambda: not said.strip()
    parts, deltas = [], []

    def hear(more):
        nonlocal said
        for part in more:
            parts.append(part)
            said += "" if part.called else part.text
        deltas.extend(caller.take())

    for piece in pieces:
        hear(caller.push(piece))
    hear(caller.flush())
    return caller.calls, said, "".join(p.text for p in parts), deltas


def cuts(text: str, seed: int) -> list[str]:
    """A text in pieces of random lengths."""
    rng, out = random.Random(seed), []
    while text:
        n = rng.randint(1, 9)
        out.append(text[:n])
        text = text[n:]
    return out


def told(deltas) -> list[tuple[str, str]]:
    """Names and arguments of the calls in deltas that were not taken back."""
    names, arguments, void = {}, {}, set()
    for d in deltas:
        if d.name:
            assert d.index == len(names)
            assert d.id
            names[d.index] = d.name
        arguments[d.index] = arguments.get(d.index, "") + d.arguments
        void |= {d.index} if d.damaged else set()
    return [(names[i], arguments[i]) for i in sorted(names) if i not in void]


def test_every_syntax_has_a_case():
    assert set(WRITTEN) == set(SYNTAXES)


@pytest.mark.parametrize(
    ("name", "text", "expected", "left"), EACH, ids=lambda v: v[:30] if type(v) is str else ""
)
def test_what_a_family_writes_is_read(name, text, expected, left):
    for pieces in ([text], list(text), *(cuts(text, seed) for seed in range(5))):
        calls, said, written, deltas = read(name, pieces)
        assert [(c.name, json.loads(c.arguments)) for c in calls] == expected
        assert said == left
        assert written == text
        assert told(deltas) == [(c.name, c.arguments) for c in calls]
        assert len({c.id for c in calls}) == len(calls)
        assert all(len(c.id) == 9 for c in calls)


def test_arguments_are_told_as_they_are_written():
    for name, text in (
        ("hermes", '<tool_call>{"name": "alpha", "arguments": {"text": "abc'),
        ("qwen-coder", "<tool_call><function=alpha><parameter=text>\nabc d"),
        ("gemma-4", '<|tool_call>call:alpha{text:<|"|>abc'),
        ("mistral", '[TOOL_CALLS]alpha[ARGS]{"text": "abc'),
    ):
        caller = Caller(SYNTAXES[name], TOOLS)
        for c in text:
            assert not list(caller.push(c))
        first, *rest = caller.take()
        assert first.name == "alpha"
        assert (first.arguments + "".join(d.arguments for d in rest)).startswith('{"text": "abc')


# Frames: how a family writes one call, from JSON or from the values as they are.

JSON_FRAMES = {
    "hermes": '<tool_call>\n{"name": "alpha", "arguments": %s}\n</tool_call>',
    "mistral": "[TOOL_CALLS]alpha[ARGS]%s",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>alpha<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.alpha:0<|tool_call_argument_begin|>%s"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "harmony": " to=functions.alpha<|channel|>commentary json<|message|>%s",
    "granite-3": '<|tool_call|>[{"name": "alpha", "arguments": %s}]',
    "command": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "alpha", "parameters": %s}]<|END_ACTION|>',
    "llama": '{"name": "alpha", "parameters": %s}',
    "apertus": '<|tools_prefix|>[{"alpha": %s}]<|tools_suffix|>',
    "nemotron": '<TOOLCALL>[{"name": "alpha", "arguments": %s}]</TOOLCALL>',
    "functionary": "<function=alpha>%s</function>",
}
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<｜tool▁call▁end｜>", "<|call|>", "<|end|>",
         "</think>", "<|im_end|>", '"', "'", "\\", "\n", "{", "}", "]", "é", "\u2028", "😀", "</parameter>",
         "</function>", "<parameter=text>", "```", '{"name": "beta_2", "arguments": {}}', "<|\"|>x", "\t"]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(HOSTILE, v, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(HOSTILE, VALUES, max_size=4), st.booleans(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_whatever_stands_in_arguments_of_json_is_theirs(arguments, ascii, seed):
    written = json.dumps(arguments, ensure_ascii=ascii)
    for name, frame in JSON_FRAMES.items():
        text = frame.replace("%s", written)
        for pieces in ([text], list(text), cuts(text, seed)):
            calls, said, back, _ = read(name, pieces)
            assert back == text
            assert [(c.name, c.arguments) for c in calls] == [("alpha", written)], name
            assert said == ""


@given(
    HOSTILE.filter(lambda s: "</parameter>" not in s or s.rstrip()[-12:] != "</parameter>"),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_whatever_stands_in_a_tag_is_its_value(value, seed):
    frames = {
        "qwen-coder": "<tool_call>\n<function=alpha>\n<parameter=text>\n%s\n</parameter>\n</function>\n</tool_call>",
        "glm": "<tool_call>alpha<arg_key>text</arg_key><arg_value>%s</arg_value></tool_call>",
        "minimax": '<minimax:tool_call>\n<invoke name="alpha">\n<parameter name="text">%s</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        "gemma-4": '<|tool_call>call:alpha{text:<|"|>%s<|"|>}<tool_call|>',
    }
    for ends in (
        "</parameter>\n<parameter=",
        "</parameter></function>",
        "</parameter>\n</function>",
        '<|"|>',
    ):
        if ends in value:  # it spells the end of a value and what follows: nobody can tell
            return
    for name, frame in frames.items():
        text = frame.replace("%s", value)
        for pieces in ([text], list(text), cuts(text, seed)):
            calls, said, back, _ = read(name, pieces)
            assert back == text
            assert said == ""
            assert [json.loads(c.arguments) for c in calls] == [{"text": value}], name


DAMAGED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\nI do not know.\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": 1, "a": 2}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"k": {"a": 1, "\\u0061": 2}}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "name": "beta_2", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {}, "parameters": {}, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"text": "never ends</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": "no JSON"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a\\u0007", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": "\\x"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": {"a": [1,]}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "alpha", "arguments": ' + '{"a": ' * 100 + "1" + "}" * 101 + "</tool_call>"),
    ("hermes", '<tool_call>{"name": "' + "x" * 2000 + '", "arguments": {}}</tool_call>'),
    ("qwen-coder", "<tool_call>\n<function=alpha>\n<parameter=text>\nnever ends"),
    ("qwen-coder", "<tool_call>\n<function=alpha>\n<parameter=text>\na\n</parameter>\n"),
    ("qwen-coder", "<tool_call>\n<function=alpha>\nno parameter\n</function>"),
    ("qwen-coder", "<tool_call><function=alpha><parameter=on>true</parameter><parameter=on>false</parameter>"
                   "</function></tool_call>"),
    ("qwen-coder", "<function=" + "x" * 2000),
    ("glm", "<tool_call>alpha<arg_key>text</arg_key>no value</tool_call>"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]alpha[ARGS]"),
    ("mistral", "[TOOL_CALLS]alpha is called"),
    ("mistral", '[TOOL_CALLS]alpha[ARGS]{"a": 1'),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
    ("harmony", "<|channel|>commentary to=functions.alpha<|message|>no JSON"),
    ("harmony", "<|channel|>final<|message|>An answer."),
    ("gemma-4", '<|tool_call>call:alpha{text:<|"|>never ends'),
    ("gemma-4", "<|tool_call>call:alpha{text:bare}<tool_call|>"),
    ("gemma-4", "<|tool_call>call:alpha{a:1,a:2}<tool_call|>"),
    ("gemma-4", "<|tool_call>call:alpha{a:" + "[" * 200),
    ("lfm2", "<|tool_call_start|>[alpha('by place')]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[alpha(a=__import__('os').system('x'))]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[alpha(a=1, a=2)]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[alpha(a=1e999)]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[alpha(a=" + "[" * 500 + "]" * 500 + ")]"),
    ("lfm2", "<|tool_call_start|>[alpha(a=" + "-" * 5000 + "1)]"),
    ("lfm2", "<|tool_call_start|>[alpha(a=" + "9" * 5000 + ")]"),
    ("lfm2", "<|tool_call_start|>[alpha(a={1})]"),
    ("lfm2", "<|tool_call_start|>[alpha(a=f'{x}')]"),
    ("llama", '{"name": "alpha", "parameters": {"text": "never'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), DAMAGED, ids=lambda v: v[:40])
def test_a_damaged_call_is_text_and_nothing_is_lost(name, text):
    for pieces in ([text], list(text), cuts(text, 1)):
        calls, said, back, deltas = read(name, pieces)
        assert calls == []
        assert said == back == text
        assert told(deltas) == []


def test_a_call_behind_a_damaged_one_is_read():
    sound = '<tool_call>{"name": "beta_2", "arguments": {"on": true}}</tool_call>'
    for damaged in ("<tool_call>oh, ", '<tool_call>{"name": "alpha", "arguments": {"a" 1}}'):
        for pieces in ([damaged + sound], list(damaged + sound)):
            calls, said, _, deltas = read("hermes", pieces)
            assert [(c.name, c.arguments) for c in calls] == [("beta_2", '{"on": true}')] == told(deltas)
            assert said.rstrip() == damaged.rstrip()


def test_what_an_unfinished_call_quotes_is_never_read_as_a_call():
    inner = '<tool_call>{\\"name\\": \\"beta_2\\", \\"arguments\\": {}}</tool_call>'
    text = f'<tool_call>{{"name": "alpha", "arguments": {{"text": "{inner}'
    calls, said, _, _ = read("hermes", [text])
    assert calls == []
    assert said == text


FRAGMENTS = {
    name: sorted({
        *(text[i:j] for text, _, _ in cases for i, j in ((0, 9), (0, 25), (20, 50), (-30, None), (-9, None))),
        *SYNTAXES[name].opens, " ", "\n", "{", "}", '"', "x", "[", "]", "(", ")", "=", ",",
    })
    for name, cases in WRITTEN.items()
}  # fmt: skip


@pytest.mark.parametrize("name", SYNTAXES)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_text_is_read_the_same_however_it_is_cut(name, data):
    parts = st.sampled_from(FRAGMENTS[name]) | st.sampled_from([c[0] for c in WRITTEN[name]])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    whole = read(name, [text])
    for pieces in (list(text), cuts(text, data.draw(st.integers(0, 99)))):
        calls, said, back, deltas = read(name, pieces)
        assert back == text == whole[2]
        assert said == whole[1]
        assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in whole[0]]
        assert told(deltas) == [(c.name, c.arguments) for c in calls] == told(whole[3])
    for call in whole[0]:
        assert isinstance(json.loads(call.arguments), dict)


def test_only_so_many_calls_as_there_may_be():
    text, calls, _ = WRITTEN["hermes"][0]
    for pieces in ([text], list(text)):
        caller = Caller(SYNTAXES["hermes"], TOOLS, most=1)
        for piece in pieces:
            for _ in caller.push(piece):
                pass
            if caller.enough:
                break
        assert [c.name for c in caller.calls] == [calls[0][0]]
        assert {d.index for d in caller.take()} == {0}


SPELLING = ["mistral-list", "deepseek-r1", "hermes", "mistral", "deepseek", "kimi", "lfm2", "olmo", "granite-3", "command", "apertus", "nemotron",
            "gigachat", "functionary", "tool-calls"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(["text", "number", "k_1"]), VALUES, max_size=3))
@example({"text": {"\0\x7f\x1b": "\0\r"}})
@settings(max_examples=25, deadline=None)
def test_what_is_spelled_for_a_template_is_read_back(arguments):
    for name in SPELLING:
        text = SYNTAXES[name].spell([("alpha", arguments), ("beta_2", {})])
        calls, said, _, _ = read(name, [text])
        assert [(c.name, json.loads(c.arguments)) for c in calls] == [("alpha", arguments), ("beta_2", {})], (
            name
        )
        assert not said.strip()
