"""Events of an answer with everything in it: a thought, a text and two calls."""

from __future__ import annotations

from tinychat.base.events import Completion, Done, Notice, Stats, TextDelta, ToolCall, ToolCallDelta

STATS = Stats(prompt_tokens=20, cached_tokens=16, generated_tokens=9, reasoning_tokens=3)
ARGUMENTS = '{"city": "Paris", "days": 2}'
CALLS = [ToolCall("call_1", "weather", ARGUMENTS), ToolCall("call_2", "time", "{}")]
EVENTS = [
    Notice("something"),
    TextDelta("", 1, "Let me "),
    TextDelta("", 2, "think."),
    TextDelta("", 3, "", "</think>"),
    TextDelta("I ", 4),
    TextDelta("look.", 5),
    ToolCallDelta(0, "call_1", "weather"),
    ToolCallDelta(0, arguments='{"city": "Par'),
    ToolCallDelta(0, arguments='is", "days": 2}'),
    ToolCallDelta(1, "call_2", "time", "{}"),
]


def done(reason="tool_calls", text="I look.", calls=CALLS, reasoning="Let me think.", **more):
    return Done(reason, STATS, Completion(text, [], reason, STATS, reasoning, list(calls), **more))
