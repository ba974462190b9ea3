"""Answers that go on after they were stopped, cut by their length, or interrupted."""

from __future__ import annotations

import json

import pytest
from session_helpers import say, spell
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.session import Session


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=256, backend="cpu", eos_ids=()) as m:
        yield m


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_k": 20, "frequency_penalty": 0.5}]
)
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_pieces_of_an_answer_are_what_it_says_in_one_go(model, sampling, draft):
    whole = say(model.session(draft=draft, **sampling), "hello", max_tokens=40).completion
    session = model.session(draft=draft, **sampling)
    said = "".join(e.text for e in session.send("hello", max_tokens=1))
    for n in (1, 2, 17, 3, 16):
        *events, done = session.go_on(max_tokens=n)
        assert (done.finish_reason, done.stats.generated_tokens) == ("length", n)
        said += "".join(e.text for e in events)
        assert session.messages[-1]["content"] == done.completion.text
    assert session.nodes[session.leaf].ids == whole.token_ids
    assert said.replace("\ufffd", "") == whole.text.replace("\ufffd", "")
    assert session.messages[-1]["content"] == whole.text
    assert len(session.nodes) == 2
    # The next turn reads it as one answer.
    other = model.session(draft=draft, **sampling)
    say(other, "hello", max_tokens=40)
    ids = [say(s, "more", max_tokens=5).completion.token_ids for s in (session, other)]
    assert ids[0] == ids[1]


def test_only_the_last_token_is_read_again(model):
    session = model.session(temperature=0)
    first = say(session, "hello", max_tokens=60)
    more = list(session.go_on(max_tokens=2))[-1].stats
    assert more.prompt_tokens == first.stats.prompt_tokens + 60
    assert more.cached_tokens >= more.prompt_tokens - 1


def test_an_answer_that_was_cancelled_goes_on_and_one_that_ended_does_not(model):
    session = model.session(temperature=0)
    with pytest.raises(UsageError, match="no answer"):
        session.go_on()
    stream = session.send("hello")
    said = [next(stream) for _ in range(5)]
    stream.close()
    assert session.nodes[session.leaf].finish_reason == "cancelled"
    done = list(session.go_on(max_tokens=6))[-1]
    whole = say(model.session(temperature=0), "hello", max_tokens=40).completion
    assert done.completion.token_ids == whole.token_ids[: len(done.completion.token_ids)]
    assert done.completion.text.startswith("".join(e.text for e in said))
    stop = whole.text[len(done.completion.text) + 2 :][:3]
    assert list(session.go_on(stop=(stop,)))[-1].finish_reason == "stop"
    with pytest.raises(UsageError, match="by itself"):
        session.go_on()


def test_what_a_gate_held_back_is_said_once(model):
    """The end of an answer that was cut may be the beginning of a stop string."""
    whole = say(model.session(temperature=0), "hello", max_tokens=40).completion
    text = whole.text[:8]
    stop = (text[-3:] + "\x00",)  # never comes, but the third last character may begin it
    for n in range(1, 12):
        session = model.session(temperature=0)
        said = "".join(e.text for e in session.send("hello", max_tokens=n, stop=stop))
        said += "".join(e.text for e in session.go_on(max_tokens=20 - n, stop=stop))
        assert said.replace("\ufffd", "") == session.messages[-1]["content"].replace("\ufffd", "")
        assert session.nodes[session.leaf].ids == whole.token_ids[:20]


def test_it_goes_on_after_a_restart_and_with_another_model_s_words(model, tmp_path):
    session = model.session(temperature=0)
    say(session, "hello", max_tokens=10)
    session.save(tmp_path / "s.json", memory=False)
    loaded = Session.load(tmp_path / "s.json", model)
    assert list(loaded.go_on(max_tokens=10))[-1].completion.token_ids == (
        list(session.go_on(max_tokens=10))[-1].completion.token_ids
    )
    saved = json.loads((tmp_path / "s.json").read_text())
    saved["model"] = "another"
    saved["nodes"][1]["content"] = "Words of"
    (tmp_path / "s.json").write_text(json.dumps(saved))
    loaded = Session.load(tmp_path / "s.json", model)
    done = list(loaded.go_on(max_tokens=5))[-1]
    assert done.completion.token_ids[:-5] == spell("Words of")
    assert done.completion.text.startswith("Words of")


def test_a_failure_before_the_first_token_leaves_the_answer_as_it_was(model, monkeypatch):
    session = model.session(temperature=0)
    before = say(session, "hello", max_tokens=10).completion

    def fail(step):
        raise MemoryError

    monkeypatch.setattr(model.backend, "step", fail)
    monkeypatch.setattr(model.backend, "step_greedy", fail, raising=False)
    with pytest.raises(MemoryError):
        list(session.go_on(max_tokens=10))
    node = session.nodes[session.leaf]
    assert (node.content, node.ids, node.finish_reason) == (before.text, before.token_ids, "length")


def test_a_stop_string_that_was_said_before_it_was_one_takes_nothing_back(model):
    session = model.session(temperature=0)
    say(session, "hello", max_tokens=20)
    said = session.messages[-1]["content"]
    for stop in (said[3:5], said[-3:-1], said):
        say_more = [*session.go_on(max_tokens=2, stop=[stop, "zz"])]
        assert say_more[-1].finish_reason == "length"
        assert session.messages[-1]["content"].startswith(said)
    whole = say(model.session(temperature=0), "hello", max_tokens=60).completion.text
    pairs = (whole[i : i + 2] for i in range(len(session.messages[-1]["content"]) + 2, len(whole)))
    later = next(pair for pair in pairs if whole.count(pair) == 1)
    *_, done = session.go_on(max_tokens=60, stop=[said[3:5], later])
    assert done.finish_reason == "stop"
    assert session.messages[-1]["content"] == whole[: whole.index(later)]
