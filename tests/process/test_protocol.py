"""What engine and screen say to each other, as lines: whole, newer, and nonsense."""

from __future__ import annotations

import io
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.base.events import Notice, Reading
from tinychat.conversation import Message
from tinychat.process import protocol, worker
from tinychat.process.protocol import EVENTS, REQUESTS, from_json, to_json

ANSWER = Message("assistant", "café 😀 \ud83d", None, "<a>\n", [1, 2], [3] * 5000, "stop", {"ttft_s": 0.5})
SAID = [
    protocol.Load("demo", {"ctx": 10, "keep_kv": False, "draft": None}),
    protocol.Answer("7", [Message("user", "hi", attachments=[{"name": "a", "text": "b"}]), ANSWER], "s", {}),
    protocol.Cancel(),
    protocol.EndThought(),
    protocol.Count(1, "text"),
    protocol.Head(2, "text", 3),
    protocol.Models(3),
    protocol.Limits(4),
    protocol.Loading("Loading", 1, 2),
    protocol.Loaded({"model": "demo", "ctx": 3}, {"stop": []}, False),
    Reading(1, 2, 3),
    protocol.Began("<a>", 7),
    protocol.Calling(1, "add"),
    protocol.Text("hm\n", 4, None),
    Notice("noted"),
    protocol.Finished(ANSWER),
    protocol.Failed("What.", "Do.", "load"),
    protocol.Reply(3, {"installed": [{"name": "x"}]}),
]


def test_every_request_and_event_is_a_line_and_comes_back():
    assert {type(said) for said in SAID} == {*REQUESTS.values(), *EVENTS.values()}
    for said in SAID:
        line = to_json(said)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        assert from_json(line, REQUESTS | EVENTS) == said


def test_what_a_newer_side_says_besides_is_ignored():
    newer = {"kind": "text", "text": "a", "tokens": 1, "mood": {"glad": [1]}}
    assert from_json(json.dumps(newer).encode(), EVENTS) == protocol.Text("a", 1)
    path = [{"role": "user", "content": "hi", "pinned": True}]
    line = json.dumps({"kind": "answer", "chat": "1", "path": path}).encode()
    assert from_json(line, REQUESTS).path == [Message("user", "hi")]
    assert from_json(b'{"kind": "picture", "bytes": 3}', EVENTS) is None
    assert from_json(to_json(protocol.Text("a", 1)), REQUESTS) is None  # an event asks for nothing


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"kind": 5}',
        b"[" * 100_000,
        b'{"kind": "text"}',
        b'{"kind": "text", "text": 5, "tokens": 1}',
        b'{"kind": "text", "text": "", "tokens": true}',
        b'{"kind": "text", "text": "", "tokens": 1.5}',
        b'{"kind": "done", "message": 3}',
        b'{"kind": "done", "message": {"role": "user"}}',
        b'{"kind": "done", "message": {"role": "wizard", "content": ""}}',
        b'{"kind": "reading", "tokens": 1, "total": 2, "rate": "fast"}',
        b'{"kind": "loaded", "facts": []}',
        b'{"kind": "answer", "chat": 1, "path": []}',
        b'{"kind": "answer", "chat": "1", "path": [[]]}',
        b'{"kind": "answer", "chat": "1", "path": [{"role": "user", "content": "", "ids": ["a"]}]}',
    ],
)
def test_nonsense_is_an_error_that_names_it(line):
    with pytest.raises(ValueError, match=r"^.{5,200}$"):
        from_json(line, REQUESTS | EVENTS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["message", "path", "text", "tokens", "id", "chat", "what", "options", "rate"])


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from([*REQUESTS, *EVENTS, "?"]), st.dictionaries(NAMES, JSON, max_size=5))
def test_any_object_is_read_or_refused(kind, values):
    try:
        said = from_json(json.dumps({**values, "kind": kind}).encode(), REQUESTS | EVENTS)
    except ValueError:
        return
    assert said is None or from_json(to_json(said), REQUESTS | EVENTS) is not None


def test_a_request_that_is_not_known_is_refused_and_the_next_one_is_taken(monkeypatch):
    ended = threading.Event()

    def end(code):
        ended.set()
        raise SystemExit

    monkeypatch.setattr(worker.os, "_exit", end)
    lines = b'{"kind": "sing", "song": 1}\nnonsense\n' + to_json(protocol.Count(5, "one two"))
    sink = io.BytesIO()
    w = worker.Worker(io.BytesIO(lines), sink, lambda *_: None)
    with pytest.raises(SystemExit):
        w._read()
    w.core.questions.put(None)
    w.core._answer_questions()
    first, second, reply = (from_json(line, EVENTS) for line in sink.getvalue().splitlines())
    assert "a request that it does not know" in first.what
    assert "again" in first.todo
    assert isinstance(second, protocol.Failed)
    assert reply == protocol.Reply(5, None)  # no model is loaded
    assert ended.is_set()
