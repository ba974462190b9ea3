"""Conversations with vLLM and SGLang as their sources have them: tools, forms, thoughts, cut answers."""

from __future__ import annotations

import json

import pytest
from dialects import DIALECTS, broken_off
from scripted_server import ScriptedServer, answer, status

from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.events import Done, ToolCallDelta
from tinychat.process import remote
from tinychat.process.address import Address
from tinychat.process.connector import Connector
from tinychat.process.served_calls import ServedCalls

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
FORM = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "object", "patternProperties": {"[^a]": True}}},
}


@pytest.fixture(params=DIALECTS.values(), ids=DIALECTS)
def dialect(request):
    return request.param


@pytest.fixture
def played(dialect, monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    for name in ("TINYCHAT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedServer() as s:
        s.listed = dialect.listed()
        yield s


def connected(played, **options):
    return Connector(Address.parse(played.url))("", options, lambda *_: None)


def done_of(events):
    done = list(events)[-1]
    assert isinstance(done, Done)
    return done


def test_a_thought_and_its_numbers(played, dialect):
    played.scripts = [
        dialect.answer({dialect.reasoning: "Let me"}, {dialect.reasoning: " see."}, {"content": "42"})
    ]
    done = done_of(connected(played).session().send("?"))
    assert (done.completion.reasoning, done.completion.text) == ("Let me see.", "42")
    s = done.stats
    assert (s.prompt_tokens, s.cached_tokens, s.generated_tokens) == (20, 16, 9)


@pytest.mark.parametrize("pieces", [["{", '"a": ', "2}"], ['{"a": 2}'], ["", '{"a": 2}']])
def test_calls_go_there_and_back(played, dialect, pieces):
    first, *rest = (
        dialect.call(0, "call_1" if i == 0 else None, "add" if i == 0 else None, p)
        for i, p in enumerate(pieces)
    )
    second = dialect.call(1, "call_2", "add", "{}")
    deltas = [{"content": "I add."}, *({"tool_calls": [c]} for c in (first, *rest, second))]
    played.scripts = [dialect.answer(*deltas, reason="tool_calls"), answer("It is 3.")]
    session = connected(played).session()
    events = list(session.send("2 + 1?", tools=[TOOL]))
    assert played.questions[0]["tools"] == [TOOL]
    done = events[-1]
    assert (done.finish_reason, done.completion.text) == ("tool_calls", "I add.")
    assert [(c.id, c.name, json.loads(c.arguments)) for c in done.completion.tool_calls] == [
        ("call_1", "add", {"a": 2}),
        ("call_2", "add", {}),
    ]
    told = [e for e in events if isinstance(e, ToolCallDelta)]
    assert "".join(e.arguments for e in told if e.index == 0) == "".join(pieces)
    assert done_of(session.send_results(["3", "0"])).completion.text == "It is 3."
    _, said, *results = played.questions[1]["messages"]
    assert said == {
        "role": "assistant",
        "content": "I add.",
        "tool_calls": [c.as_dict() for c in done.completion.tool_calls],
    }
    assert results == [
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "tool", "content": "0", "tool_call_id": "call_2"},
    ]


def test_a_call_that_was_cut_is_text(played, dialect):
    deltas = [{"tool_calls": [dialect.call(0, "x", "add", '{"a": ')]}]
    played.scripts = [dialect.answer(*deltas, {"content": ""}, reason="length")]
    session = connected(played).session()
    events = list(session.send("?", tools=[TOOL]))
    assert events[-1].finish_reason == "length"
    assert (events[-1].completion.text, events[-1].completion.tool_calls) == ('add{"a": ', [])
    assert [e.damaged for e in events if isinstance(e, ToolCallDelta)] == [False, True]
    assert session.messages[-1]["content"] == 'add{"a": '


def test_a_server_without_a_parser_says_so(played, dialect):
    played.scripts = [status(400, dialect.error(dialect.auto_refused))]
    with pytest.raises(TinychatError) as e:
        list(connected(played).session().send("?", tools=[TOOL]))
    assert dialect.auto_refused in e.value.what
    assert len(played.questions) == 1  # tools are not left out in silence


def test_a_schema_is_asked_for_as_it_was_given(played, dialect):
    played.scripts = [answer("{}"), status(400, dialect.error("response_format is not supported"))]
    session = connected(played).session()
    session.response_format = FORM
    list(session.send("?"))
    inner = played.questions[0]["response_format"]["json_schema"]
    assert inner == {"name": "answer", "strict": True, "schema": FORM["json_schema"]["schema"]}
    with pytest.raises(TinychatError, match="response_format is not supported"):
        list(session.send("?"))
    for wrong in ({"type": "regex", "pattern": "x"}, {"type": "json_schema"}, 3):
        with pytest.raises(UsageError):
            session.response_format = wrong
    session.response_format = None
    list(session.send("?"))
    assert "response_format" not in played.questions[-1]


def test_whether_and_how_much_to_think_is_said_in_every_way_that_they_know(played):
    session = connected(played, think=False, effort="low").session(think_budget=9)
    list(session.send("?"))
    asked = played.questions[0]
    assert asked["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert (asked["reasoning_effort"], asked["think_budget"], asked["thinking_token_budget"]) == ("low", 9, 9)


def test_a_cut_answer_goes_on(played, dialect):
    cut = dialect.answer({dialect.reasoning: "hm"}, {"content": "One, two"}, reason="length")
    # A parser that looks for the end of a thought takes all of it for one.
    more = dialect.answer({dialect.reasoning: ", three"}, {"content": ", four."})
    played.scripts = [cut, status(503, dialect.error("busy", 503)), more]
    session = connected(played, think=True).session()
    assert session.continues
    list(session.send("Count."))
    events = list(session.go_on())
    done = events[-1]
    assert (done.completion.text, done.completion.reasoning) == ("One, two, three, four.", "hm")
    assert "".join(e.text for e in events[:-1]) == ", three, four."
    assert session.nodes[-1].split() == ("hm", "One, two, three, four.")
    assert len(session.nodes) == 2
    asked = played.questions[-1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "One, two"}
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    assert asked["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    list(session.send("And?"))
    assert "continue_final_message" not in played.questions[-1]


def test_a_cut_thought_does_not_go_on(played, dialect):
    played.scripts = [
        dialect.answer({dialect.reasoning: "hm"}, {dialect.reasoning: ", well"}, reason="length")
    ]
    session = connected(played).session()
    list(session.send("?"))
    with pytest.raises(UsageError, match="cut in its thought"):
        list(session.go_on())
    assert session.nodes[-1].split()[0] == "hm, well"


def test_an_error_in_a_stream_is_said_in_its_words(played, dialect):
    played.scripts = [broken_off(dialect, "CUDA out of memory", {"role": "assistant"}, {"content": "One"})]
    session = connected(played).session()
    with pytest.raises(TinychatError, match="CUDA out of memory"):
        list(session.send("?"))
    assert session.messages[-1]["content"] == "One"


def test_others_are_not_believed_to_go_on(monkeypatch):
    with ScriptedServer([answer("One, two")]) as other:
        other.listed["data"][0]["owned_by"] = "openai"
        session = connected(other).session()
        list(session.send("Count."))
        session.nodes[-1].finish_reason = "length"
        assert not session.continues
        with pytest.raises(UsageError, match="not known to go on"):
            list(session.go_on())
        assert session.nodes[-1].finish_reason == "length"
        assert len(other.questions) == 1


def calls(*chunks):
    served = ServedCalls()
    for chunk in chunks:
        list(served.take(chunk))
    whole, lost = served.end()
    return [(c.name, c.arguments) for c in whole], lost, [c.id for c in whole]


def test_calls_of_other_servers_are_understood():
    f = lambda name, arguments: {"function": {"name": name, "arguments": arguments}}  # noqa: E731
    one, two = ("f", '{"a": 1}'), ("g", "{}")
    # The name again with each piece, and another id each time.
    again = [{"index": 0, "id": str(i), **f("f", p)} for i, p in enumerate(['{"a"', ": 1}"])]
    assert calls(*([c] for c in again))[:2] == ([one], [])
    # Every call is number 0, and whole.
    same = [{"index": 0, "id": n, **f(*c)} for n, c in (("x", one), ("y", two))]
    assert calls(*([c] for c in same)) == ([one, two], [], ["x", "y"])
    # Arguments as an object, without index or id; no arguments at all.
    assert calls([f("f", {"a": 1}), f("g", None)])[0] == [one, two]
    # The same id for two calls; no id.
    assert len(set(calls([{"index": i, "id": "x", **f(*two)} for i in range(3)])[2])) == 3
    # What makes no sense.
    for wrong in (
        3,
        [3],
        [{}],
        [{"function": 3}],
        [f(3, "{}")],
        [f("", "{}")],
        [{"index": [], **f(None, "{}")}],
    ):
        assert calls(wrong) == ([], [], [])
    for damaged in ("[1]", "{", '{"a": 1, "a": 2}', "{} {}"):
        assert calls([f("f", damaged)]) == ([], [(0, f"f{damaged}")], [])
    assert len(calls([{"index": i, **f(*two)} for i in range(1000)])[0]) == 128
