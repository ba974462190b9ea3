"""`run_tools`: calls are run, results go back, and nothing runs that was not passed."""

from __future__ import annotations

import asyncio
import enum
import json
import threading

import pytest
from said import says
from tiny import tiny_model

import tinychat
from tinychat.base.errors import UsageError
from tinychat.base.events import ToolCall
from tinychat.tool_loop import LONGEST_RESULT, run_call


class Unit(enum.Enum):
    METRE, FOOT = "m", "ft"


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def measure(of: str, unit: Unit = Unit.METRE) -> dict:
    """Measures."""
    return {"of": of, "unit": unit.name}


def fail(text: str) -> None:
    """Fails."""
    raise RuntimeError(f"no {text}")


def written(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=4096, backend="cpu", context_length=4096) as m:
        yield m


def test_the_answer_comes_after_what_was_called(model, monkeypatch):
    says(monkeypatch, model, f"{written('add', a=2, b=3)}\n{written('measure', of='it', unit='ft')}", "Five.")
    run = tinychat.run_tools(model, "2 + 3?", [add, measure], temperature=0)
    assert (run.text, run.completion.finish_reason) == ("Five.", "stop")
    assert [m["role"] for m in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    results = [m for m in run.messages if m["role"] == "tool"]
    assert [m["content"] for m in results] == ["5", '{"of": "it", "unit": "FOOT"}']
    assert [m["tool_call_id"] for m in results] == [c["id"] for c in run.messages[1]["tool_calls"]]
    assert model.chat(run.messages, temperature=0, tools=[add, measure]).text == "Five."


def test_turns_are_bounded_and_calls_that_nobody_ran_are_there_to_be_seen(model, monkeypatch):
    says(monkeypatch, model, written("add", a=1, b=1))
    run = tinychat.run_tools(model, "?", [add], most_turns=2, temperature=0)
    assert [m["role"] for m in run.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert run.completion.finish_reason == "tool_calls"
    assert [c.name for c in run.completion.tool_calls] == ["add"]


def test_a_call_that_is_not_allowed_is_not_run_and_the_model_knows(model, monkeypatch):
    says(monkeypatch, model, written("fail", text="x"), "Well.")
    asked = []
    run = tinychat.run_tools(model, "?", [fail], allow=lambda call: asked.append(call), temperature=0)
    assert [c.name for c in asked] == ["fail"]
    assert run.messages[2]["content"] == "Error: the user does not allow this call."


def test_only_what_was_passed_is_run(model, monkeypatch):
    says(monkeypatch, model, written("os.system", command="true"), "Well.")
    run = tinychat.run_tools(model, "?", [add], temperature=0)
    assert run.messages[2]["content"] == "Error: there is no tool os.system. There is: add."


@pytest.mark.parametrize(("arguments", "says"), [
    ('{"a": 1}', "cannot be called so: missing a required argument: 'b'"),
    ('{"a": 1, "b": 2, "c": 3}', "cannot be called so: got an unexpected keyword argument 'c'"),
    ('{"a": 1, "b": "x"}', "TypeError"),
])  # fmt: skip
def test_a_call_that_does_not_fit_is_told_to_the_model(arguments, says):
    text = run_call(ToolCall("1", "add", arguments), {"add": add})
    assert text.startswith("Error: ")
    assert says in text


def test_what_a_function_raises_or_returns_becomes_text():
    assert run_call(ToolCall("1", "fail", '{"text": "x"}'), {"fail": fail}) == "Error: RuntimeError: no x"
    bad = run_call(ToolCall("1", "measure", '{"of": "x", "unit": "mile"}'), {"measure": measure})
    assert bad.startswith("Error: measure cannot be called so: 'mile' is not a valid Unit")
    long = run_call(ToolCall("1", "f", "{}"), {"f": lambda: "x" * 100_000})
    assert long.startswith("x" * LONGEST_RESULT)
    assert long.endswith("\n(cut: the result has 100,000 characters)")


def test_what_is_no_function_is_refused(model):
    async def wait(x: int) -> int:
        """Waits."""
        return x

    for functions in ([3], [add, add], "add", [{"name": "add"}]):
        with pytest.raises(UsageError):
            tinychat.run_tools(model, "?", functions)
        with pytest.raises(UsageError):
            asyncio.run(tinychat.arun_tools(model, "?", functions))
    with pytest.raises(UsageError, match="arun_tools"):
        tinychat.run_tools(model, "?", [wait])
    with pytest.raises(UsageError):
        tinychat.run_tools(model, "?", [add], most_turns=0)


def test_coroutines_are_awaited_and_what_blocks_runs_beside_the_loop(model, monkeypatch):
    here = []

    async def turn(degrees: int) -> str:
        """Turns."""
        await asyncio.sleep(0)
        here.append(threading.current_thread() is threading.main_thread())
        return f"{degrees} degrees"

    def block() -> None:
        """Blocks."""
        here.append(threading.current_thread() is threading.main_thread())

    async def broken() -> None:
        """Breaks."""
        raise ValueError("broken")

    async def allow(call):
        return call.name != "secret"

    calls = [
        written("turn", degrees=90),
        written("turn"),
        written("block"),
        written("broken"),
        written("secret"),
    ]
    says(monkeypatch, model, "\n".join(calls), "Done.")
    run = asyncio.run(tinychat.arun_tools(model, "?", [turn, block, broken], allow=allow, temperature=0))
    assert run.text == "Done."
    assert [m["content"] for m in run.messages if m["role"] == "tool"] == [
        "90 degrees",
        "Error: turn cannot be called so: missing a required argument: 'degrees'",
        "null",
        "Error: ValueError: broken",
        "Error: the user does not allow this call.",
    ]
    assert here == [True, False]
