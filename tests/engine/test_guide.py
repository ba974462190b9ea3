"""Thoughts of bounded length, and answers of a form behind them, whatever the model would rather say."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from speaker import ENDLESS, HARMONY, OPENED, QWEN, saying, speaker, thinker

from tinychat.base.errors import UsageError
from tinychat.base.events import TextDelta

YES_NO = {
    "type": "json_schema",
    "json_schema": {
        "schema": {
            "type": "object",
            "properties": {"a": {"enum": ["yes", "no"]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}


def channels(said):
    analysis = "<|channel|>analysis<|message|>" + ENDLESS
    if "final<|message|>" not in said:
        return analysis[len(said) :] if analysis.startswith(said) else "h"
    told = said.partition("final<|message|>")[2]
    return "Well, yes."[len(told) :] if "Well, yes.".startswith(told) else ""


CASES = {
    "qwen": (QWEN, thinker(), "<think>\n"),
    "opened": (OPENED, thinker(opening=""), ""),
    "channels": (HARMONY, channels, "<|channel|>analysis<|message|>"),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, monkeypatch):
    template, wish, opening = request.param
    with speaker(monkeypatch, template, wish) as model:
        yield model, opening


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_thought_is_closed_at_its_budget_and_the_answer_begins(case, draft, temperature):
    model, opening = case
    settings = dict(draft=draft, temperature=temperature, seed=1, think_budget=30, max_tokens=200)
    done = model.chat("Well?", **settings)
    assert (done.text, done.finish_reason) == ("Well, yes.", "stop")
    spent = len(model.tokenizer.encode(opening, special=True))
    assert done.reasoning.rstrip() == ENDLESS[: 30 - spent].rstrip()
    closing = "<|end|>" if model.template.source == HARMONY else "\n</think>"
    assert done.stats.reasoning_tokens == 30 + len(model.tokenizer.encode(closing, special=True))
    whole = model.chat("Well?", **{**settings, "think_budget": None})
    assert (whole.text, whole.finish_reason) == ("", "length")


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7, 11])
def test_drafts_and_budgets_of_any_length_agree(case, budget):
    model, _ = case
    say = dict(temperature=1, seed=budget, max_tokens=70, think_budget=budget)
    plain = model.chat("hm, hm, hm, Well?", draft="none", **say)
    for k in (2, 8):
        session = model.session(draft="ngram", **say)
        session.speculator.controller.fixed = k
        *_, done = session.send("hm, hm, hm, Well?")
        assert done.completion.token_ids == plain.token_ids
        assert (done.completion.text, done.completion.reasoning) == (plain.text, plain.reasoning)
    assert plain.text == "Well, yes."


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_an_answer_of_a_form_comes_after_the_thought(case, draft):
    model, _ = case
    done = model.chat("Well?", response_format=YES_NO, think_budget=20, temperature=1, seed=2, draft=draft)
    assert json.loads(done.text) in ({"a": "yes"}, {"a": "no"})
    assert done.finish_reason == "stop"
    assert done.reasoning.startswith("hm, hm")


def test_a_model_cannot_end_its_answer_in_a_thought_where_a_form_is_asked_for(monkeypatch):
    with speaker(monkeypatch, OPENED, saying("hm")) as model:
        done = model.chat("Well?", response_format=YES_NO, think_budget=15, temperature=0, max_tokens=60)
        assert json.loads(done.text)
        assert model.chat("Well?", temperature=0, max_tokens=60).text == ""


@pytest.mark.parametrize(
    ("script", "reasoning"),
    [
        ('<think>\nhm\n</think>\n\n{"a":"no"}', "hm"),
        ('<think>\nhm\n</think>{"a":"no"}', "hm"),
        ('{"a":"no"}', ""),
        ('Sure! {"a":"no"}', ""),
    ],
)
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_model_that_ends_its_thought_itself_is_heard_and_the_gap_is_written_as_the_template_has_it(
    monkeypatch, script, reasoning, draft
):
    with speaker(monkeypatch, QWEN, saying(script)) as model:
        session = model.session(response_format=YES_NO, temperature=0, draft=draft)
        *deltas, done = session.send("Well?")
        assert json.loads(done.completion.text)["a"] in ("yes", "no")
        assert done.completion.reasoning == reasoning
        written = "".join(e.written for e in deltas if isinstance(e, TextDelta))
        assert session.nodes[-1].content == written == model.tokenizer.decode(done.completion.token_ids)
        if reasoning:
            assert written.startswith("<think>\nhm\n</think>\n\n{")


def test_an_answer_that_looks_like_a_thought_is_one_where_its_form_says_so(monkeypatch):
    with speaker(monkeypatch, QWEN, saying("<think>yes</think>")) as model:
        spelled = {"type": "regex", "pattern": "\n?<think>(yes|no)</think>"}
        done = model.chat("Well?", response_format=spelled, think=False, temperature=0)
        assert (done.text, done.reasoning) in (
            (f"{n}<think>{a}</think>", "") for n in ("", "\n") for a in ("yes", "no")
        )


def test_without_a_thought_the_form_holds_from_the_first_token(monkeypatch):
    with speaker(monkeypatch, QWEN, thinker()) as model:
        done = model.chat("Well?", response_format=YES_NO, think=False, temperature=0)
        assert (json.loads(done.text)["a"] in ("yes", "no"), done.reasoning) == (True, "")


def test_a_thought_ends_when_somebody_wants_it(case):
    model, _ = case
    session = model.session(temperature=0, max_tokens=200, draft="ngram")
    events = session.send("Well?")
    for _ in range(40):
        next(events)
    session.end_thought()
    *_, done = events
    assert done.completion.text == "Well, yes."
    assert 30 <= done.stats.reasoning_tokens < 60
    session.end_thought()  # nobody is thinking
    *_, done = session.send("And?", think_budget=5)
    assert done.completion.text == "Well, yes."


def test_a_form_that_is_cut_says_length(case):
    model, _ = case
    done = model.chat("Well?", response_format=YES_NO, think_budget=3, max_tokens=45, temperature=0)
    short = model.chat("Well?", response_format=YES_NO, think_budget=3, max_tokens=6, temperature=0)
    assert done.finish_reason == "stop"
    assert short.finish_reason == "length"


def test_levels_of_effort_and_the_switch_are_the_templates(monkeypatch):
    with speaker(monkeypatch, HARMONY, channels) as model:
        model.chat("Well?", effort="high", think_budget=3)
        assert model.template.render([], **model.template.switches(effort="low")).startswith("Reasoning: low")
        with pytest.raises(UsageError, match="effort='sideways' is not known"):
            model.request("Well?", effort="sideways")
    with speaker(monkeypatch, OPENED, thinker()) as model:
        for settings, why in (({"effort": "low"}, "no levels of effort"), ({"think": True}, "no switch")):
            with pytest.raises(UsageError, match=why):
                model.request("Well?", **settings)


FINAL = "{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}"
CALLING = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + HARMONY.replace(
    FINAL,
    "{% if m.tool_calls %}{{ ' to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json'"
    " + '<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}{% elif m.content %}"
    + FINAL
    + "{% endif %}",
)


def choose(unit: Literal["C", "F"], on: bool):
    """Chooses."""


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_required_call_in_a_channel_comes_behind_a_thought_of_its_budget(monkeypatch, draft):
    with speaker(monkeypatch, CALLING, channels) as model:
        how = {"tools": [choose], "tool_choice": "required", "draft": draft, "max_tokens": 200}
        answer = model.chat("?", think_budget=30, **how)
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")
        assert answer.reasoning == ENDLESS[: 30 - len("?analysis?")]
        (call,) = answer.tool_calls
        assert call.name == "choose"
        given = json.loads(call.arguments)
        assert (set(given), given["unit"] in "CF", type(given["on"])) == ({"unit", "on"}, True, bool)
        cut = model.chat("?", think_budget=30, **how | {"max_tokens": 50})
        assert (cut.tool_calls, cut.finish_reason) == ([], "length")


def test_strict_tools_leave_a_channel_of_words_free(monkeypatch):
    words = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>No {call}."
    with speaker(monkeypatch, CALLING, saying(words)) as model:
        tool = {**model.request("?", tools=[choose]).tools[0]["function"], "strict": True}
        answer = model.chat("?", tools=[tool], max_tokens=200)
        assert (answer.reasoning, answer.text, answer.finish_reason) == ("hm", "No {call}.", "stop")
        assert model.request("?", tools=[tool]).form.throughout
        form = model.request("?", tools=[tool], response_format=YES_NO).form
        held = model.chat("?", tools=[tool], response_format=YES_NO, max_tokens=200)
        assert form.throughout
        assert (held.reasoning, json.loads(held.text)["a"] in ("yes", "no")) == ("hm", True)


def test_an_answer_that_is_no_beginning_of_a_form_cannot_go_on_in_it(monkeypatch):
    with speaker(monkeypatch, QWEN, saying("Well, yes.")) as model:
        session = model.session(temperature=0)
        list(session.send("?", max_tokens=4))
        session.response_format = YES_NO
        with pytest.raises(UsageError, match="does not begin as the form") as e:
            list(session.go_on())
        assert "take the form away" in e.value.todo
        session.response_format = None
        assert list(session.go_on())[-1].finish_reason == "stop"
        session.response_format = YES_NO
        held = list(session.send("?", max_tokens=5))[-1]
        assert held.finish_reason == "length"
        assert json.loads(list(session.go_on(max_tokens=100))[-1].completion.text)["a"] in ("yes", "no")


@pytest.mark.parametrize("n", range(30, 36))
def test_a_thought_that_goes_on_with_a_smaller_budget_is_closed_at_once(monkeypatch, n):
    with speaker(monkeypatch, QWEN, thinker()) as model:
        session = model.session(temperature=0)
        list(session.send("?", max_tokens=n))
        heard = session.nodes[-1].content
        done = list(session.go_on(think_budget=20, max_tokens=100))[-1]
        assert done.completion.written == heard + "\n</think>\n\nWell, yes."


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize(
    ("stop", "text"), [("}", '{"a": "yes"'), ('"a"', "{"), (': "y', '{"a"'), ('yes"}', '{"a": "')]
)
def test_stop_strings_end_a_form_where_they_come(monkeypatch, draft, stop, text):
    with speaker(monkeypatch, QWEN, saying('{"a": "yes"}')) as model:
        held = model.chat("?", response_format=YES_NO, stop=[stop], temperature=0, draft=draft)
        assert (held.text, held.finish_reason, held.stop) == (text, "stop", stop)
        assert model.tokenizer.decode(held.token_ids) == text
