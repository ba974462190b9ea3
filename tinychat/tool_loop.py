"""Answering with tools: the model calls, functions run, results go back, until it answers in words."""

from __future__ import annotations

import enum
import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinychat.base import arguments, tools
from tinychat.base.errors import UsageError
from tinychat.base.events import Completion, ToolCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tinychat.keywords import ChatKeywords
    from tinychat.model import Model

MOST_TURNS = 8
LONGEST_RESULT = 1 << 16  # characters of one result that the model reads
NOT_ALLOWED = "Error: the user does not allow this call."
Function = Callable[..., Any]


@dataclass
class ToolRun:
    """The last answer, and the whole conversation with it: `messages` may be gone on with.

    Where the turns were used up, `completion.tool_calls` holds calls that nobody ran.
    """

    completion: Completion
    messages: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """What the model answered in the end."""
        return self.completion.text


def run_tools(
    model: Model,
    messages: str | Iterable[Mapping[str, Any]],
    functions: Iterable[Function],
    *,
    most_turns: int = MOST_TURNS,
    allow: Callable[[ToolCall], bool] = lambda call: True,
    **options: Unpack[ChatKeywords],
) -> ToolRun:
    """Have a model answer, and run what it calls: these functions and nothing else.

    functions: typed, with docstrings, of which schemas are made (`Model.chat`). most_turns: answers with
    calls, at most. allow: is asked before each call; where it says False, the model is told so. options: of
    `Model.chat`; a call that they require is required of the first answer.

    What a function raises, a call that does not fit it and a name that nobody has are told to the model as
    text. Raises UsageError for what is no function.
    """
    known = {t.__name__: t for t in _functions(functions)}
    for function in known.values():
        if inspect.iscoroutinefunction(function):
            raise UsageError(f"{function.__name__} is a coroutine function.", "Await arun_tools(…) instead.")
    turns = _turns(arguments.messages(messages), known, most_turns, options)
    with closing(turns):
        try:
            step = next(turns)
            while True:
                if isinstance(step, ToolCall):
                    step = turns.send(run_call(step, known) if allow(step) else NOT_ALLOWED)
                else:
                    step = turns.send(model.chat(step, **options))
        except StopIteration as end:
            return end.value


async def arun_tools(
    model: Model,
    messages: str | Iterable[Mapping[str, Any]],
    functions: Iterable[Function],
    *,
    most_turns: int = MOST_TURNS,
    allow: Callable[[ToolCall], bool | Awaitable[bool]] = lambda call: True,
    **options: Unpack[ChatKeywords],
) -> ToolRun:
    """`run_tools` for coroutines. Coroutine functions are awaited, others and `allow` run in threads, so that
    the event loop goes on. Cancelling the task stops the answer between two steps.
    """
    import asyncio

    known = {t.__name__: t for t in _functions(functions)}
    turns = _turns(arguments.messages(messages), known, most_turns, options)
    with closing(turns):
        try:
            step = next(turns)
            while True:
                if isinstance(step, ToolCall):
                    allowed = await asyncio.to_thread(allow, step)
                    if inspect.isawaitable(allowed):
                        allowed = await allowed
                    step = turns.send(await _result(step, known) if allowed else NOT_ALLOWED)
                else:
                    step = turns.send(await model.achat(step, **options))
        except StopIteration as end:
            return end.value


def _turns(
    said: list[dict[str, Any]], known: Mapping[str, Function], most_turns: int, options: ChatKeywords
) -> Generator[list[dict[str, Any]] | ToolCall, Any, ToolRun]:
    """Yields messages and is sent the answer with `options`; yields calls and is sent their results."""
    arguments.integer("most_turns", most_turns, 1)
    options["tools"] = list(known.values())
    for turn in range(most_turns + 1):
        answer = yield said
        said.append(answer.message())
        if answer.finish_reason != "tool_calls" or turn == most_turns:
            break
        for call in answer.tool_calls:
            result = yield call
            said.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
        if options.get("tool_choice") != "none":
            options["tool_choice"] = "auto"
    return ToolRun(answer, said)


def run_call(call: ToolCall, functions: Mapping[str, Function]) -> str:
    """The text that the model is told of a call: what the function returned, or what went wrong."""
    given = _arguments(call, functions)
    if isinstance(given, str):
        return given
    try:
        return _text(functions[call.name](**given))
    except Exception as e:  # a stranger's function; the model may know better next time
        return _text(f"Error: {type(e).__name__}: {e}")


async def _result(call: ToolCall, functions: Mapping[str, Function]) -> str:
    """`run_call` of a function that may be a coroutine function."""
    import asyncio

    function = functions.get(call.name)
    if function is None or not inspect.iscoroutinefunction(function):
        return await asyncio.to_thread(run_call, call, functions)
    given = _arguments(call, functions)
    if isinstance(given, str):
        return given
    try:
        return _text(await function(**given))
    except Exception as e:
        return _text(f"Error: {type(e).__name__}: {e}")


def _arguments(call: ToolCall, functions: Mapping[str, Function]) -> dict[str, Any] | str:
    """What the function is called with, or what the model is told if that cannot be."""
    function = functions.get(call.name)
    if function is None:
        return f"Error: there is no tool {call.name}. There is: {', '.join(functions) or 'none'}."
    try:
        given = _given(function, json.loads(call.arguments))
        inspect.signature(function).bind(**given)
    except (TypeError, ValueError) as e:
        return f"Error: {call.name} cannot be called so: {e}"
    return given


def _functions(given: Iterable[Function]) -> list[Function]:
    found = arguments.items("functions", given, "functions")
    for function in found:
        if not callable(function) or not hasattr(function, "__name__"):
            raise UsageError(f"{arguments.shown(function)} is no function.", "Give functions.")
    tools.tools(found)
    return found


def _given(function: Function, values: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the function has them: members of an Enum by their value."""
    hints = typing.get_type_hints(function)
    return {
        key: hint(value)
        if isinstance(hint := hints.get(key), type) and issubclass(hint, enum.Enum)
        else value
        for key, value in values.items()
    }


def _text(result: Any) -> str:
    """A result as the model reads it."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    if len(text) <= LONGEST_RESULT:
        return text
    return f"{text[:LONGEST_RESULT]}\n(cut: the result has {len(text):,} characters)"
