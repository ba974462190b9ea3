"""Answering with tools: the model calls, functions run, results go back, until it answers in words."""

from __future__ import annotations

import enum
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
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
    arguments.integer("most_turns", most_turns, 1)
    said = arguments.messages(messages)
    options["tools"] = list(known.values())
    for turn in range(most_turns + 1):
        answer = model.chat(said, **options)
        said.append(answer.message())
        if answer.finish_reason != "tool_calls" or turn == most_turns:
            break
        for call in answer.tool_calls:
            result = run_call(call, known) if allow(call) else "Error: the user does not allow this call."
            said.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
        if options.get("tool_choice") != "none":
            options["tool_choice"] = "auto"
    return ToolRun(answer, said)


def run_call(call: ToolCall, functions: Mapping[str, Function]) -> str:
    """The text that the model is told of a call: what the function returned, or what went wrong."""
    function = functions.get(call.name)
    if function is None:
        return f"Error: there is no tool {call.name}. There is: {', '.join(functions) or 'none'}."
    try:
        given = _given(function, json.loads(call.arguments))
        inspect.signature(function).bind(**given)
    except (TypeError, ValueError) as e:
        return f"Error: {call.name} cannot be called so: {e}"
    try:
        text = _written(function(**given))
    except Exception as e:  # a stranger's function; the model may know better next time
        text = f"Error: {type(e).__name__}: {e}"
    if len(text) <= LONGEST_RESULT:
        return text
    return f"{text[:LONGEST_RESULT]}\n(cut: the result has {len(text):,} characters)"


def _functions(given: Iterable[Function]) -> list[Function]:
    found = arguments.items("functions", given, "functions")
    for function in found:
        if not callable(function) or not hasattr(function, "__name__"):
            raise UsageError(f"{arguments.shown(function)} is no function.", "Give functions.")
        if inspect.iscoroutinefunction(function):
            raise UsageError(
                f"{function.__name__} is a coroutine function.",
                "Give a function that runs it: asyncio.run(…).",
            )
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


def _written(result: Any) -> str:
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, default=str)
