"""What a prompt of Python shows of models, sessions, answers and events: one short line each."""

from __future__ import annotations

import pytest
from session_helpers import GREEDY
from tiny import tiny_model

from tinychat.base.events import (
    Completion,
    Done,
    Logprobs,
    Notice,
    Reading,
    Stats,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)

LONG = "A glacier is a body of dense ice that moves under its own weight, century after century."


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (TextDelta(" ice", 7), "TextDelta(text=' ice', token_id=7)"),
        (TextDelta("", 7), "TextDelta(text='', token_id=7)"),
        (TextDelta("", 7, reasoning="Hm"), "TextDelta(text='', token_id=7, reasoning='Hm')"),
        (
            TextDelta("a", 7, logprobs=Logprobs(7, -0.5)),
            "TextDelta(text='a', token_id=7, logprobs=Logprobs(token_id=7, logprob=-0.5, top=()))",
        ),
        (
            TextDelta(LONG, None),
            "TextDelta(text='A glacier is a body of dense ice that moves under its own we'…, token_id=None)",
        ),
        (ToolCallDelta(0, arguments='{"a'), "ToolCallDelta(index=0, arguments='{\"a')"),
        (Notice("No draft."), "Notice(message='No draft.')"),
        (Reading(512, 2048, 309.87654), "Reading(tokens=512, total=2048, rate=309.9)"),
        (Stats(), "Stats()"),
        (Stats(prompt_tokens=3, ttft_s=0.08123), "Stats(prompt_tokens=3, ttft_s=0.08123)"),
    ],
    ids=lambda value: value.partition("(")[0] if isinstance(value, str) else "",
)
def test_an_event_shows_what_it_says_and_no_defaults(event, line):
    assert repr(event) == line


def test_an_answer_shows_its_beginning_its_end_and_its_rate():
    answer = Completion(LONG, list(range(19)), "length", Stats(decode_tps=37.44), written=LONG)
    line = f"<Completion {LONG[:60]!r}…, length, 19 tokens, 37.4 tok/s>"
    assert repr(answer) == line
    assert repr(Done("length", answer.stats, answer)) == f"<Done {line}>"
    call = ToolCall("1", "add", '{"a": 2}')
    answer = Completion("", [5], "tool_calls", reasoning="Hm.", tool_calls=[call], written="<call>")
    assert repr(answer) == (
        "<Completion '', tool_calls, 1 token, reasoning='Hm.', "
        "tool_calls=[ToolCall(id='1', name='add', arguments='{\"a\": 2}')]>"
    )


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    for shown in (TextDelta("\x1b[2J", 1), Completion("\x1b[2J", [1], "stop"), Notice("\x1b[2J")):
        assert "\x1b" not in repr(shown)


def test_a_model_and_a_session_say_who_they_are():
    with tiny_model(ctx=256) as model:
        assert repr(model) == f"<Model {model.name}: llama, reference torch, context 256>"
        session = model.session(**GREEDY)
        assert repr(session) == f"<Session with {model.name}: 0 messages>"
        running = session.send("hi")
        next(running)
        assert repr(session) == f"<Session with {model.name}: 2 messages, answering>"
        list(running)
        list(session.regenerate())
        assert repr(session) == f"<Session with {model.name}: 2 messages of 3>"
