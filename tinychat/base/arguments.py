"""Checks of what Python programs give, before anything is done with it: UsageError says what it should be."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Collection, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from tinychat.base.errors import UsageError

CALL = '{"id": "…", "type": "function", "function": {"name": "…", "arguments": "{…}"}}'
DEEPEST = 100  # lists and dicts in each other
MESSAGE = '{"role": "user", "content": "…"}'


def shown(value: Any) -> str:
    """A value in an error, however large it is and whatever its repr does."""
    try:
        text = repr(value)
    except Exception:  # a stranger's class, or a whole number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def integer(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """A whole number of any kind (numpy's, torch's), but no bool, from low to high."""
    try:
        if isinstance(value, bool):
            raise TypeError
        n = operator.index(value)
    except TypeError:
        n = low - 1
    if n < low or (high is not None and n > high):
        bounds = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {shown(value)}.", f"It must be a whole number, {bounds}.")
    return n


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number of any kind, but no bool and not NaN, from low to high."""
    try:
        if isinstance(value, (bool, str, bytes)) or not low <= value <= high:
            raise TypeError
        return value if type(value) in (int, float) else float(value)
    except (TypeError, ValueError, ArithmeticError):
        raise UsageError(f"{name} is {shown(value)}.", f"It must lie between {low} and {high}.") from None


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}.", "Use True or False.")
    return value


def choice(name: str, value: Any, known: Collection[str], todo: str) -> None:
    """One of these texts, or UsageError with `todo`."""
    if not isinstance(value, str) or value not in known:  # an array has an equality of its own
        raise UsageError(f"{name}={shown(value)} is not known.", todo)


def text(name: str, value: Any, empty: bool = False) -> str:
    """A text; empty: of no characters too."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}, not a text.", "Give a str.")
    if not value and not empty:
        raise UsageError(f"{name} is empty.", "Give at least one character.")
    return value


def path(name: str, value: Any) -> Path:
    """A path, from a text or a path."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise UsageError(f"{name} is {shown(value)}.", "Give a path.")
    return Path(value)


def items(name: str, value: Any, what: str) -> list[Any]:
    """The items of any iterable, read once: a list, a tuple, a generator, a view, an array."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} is {shown(value)}.", f"Give a list of {what}.")
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        raise UsageError(f"{name} is {shown(value)}.", f"Give a list of {what}.") from None


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Texts of at least one character: one, or an iterable of them; None is none."""
    given = [] if value is None else [value] if isinstance(value, str) else items(name, value, "texts")
    if any(not isinstance(s, str) or not s for s in given):
        raise UsageError(f"{name} is {shown(value)}.", "Give texts of at least one character.")
    return tuple(given)


def token_ids(value: Any, vocabulary: int) -> list[int]:
    """Token ids below `vocabulary`, from any iterable of whole numbers."""
    if isinstance(value, Set):
        raise UsageError(f"The token ids are {shown(value)}.", "Give a list: a set has no order.")
    ids = items("The list of token ids", value, "whole numbers")
    return [integer("A token id", i, 0, vocabulary - 1) for i in ids]


def is_shallow(value: Any, most: int = DEEPEST) -> bool:
    """Whether lists and dicts are in each other at most so deep."""
    left = [(value, 0)]
    while left:
        v, depth = left.pop()
        if depth > most:
            return False
        inner = v.values() if isinstance(v, Mapping) else v if isinstance(v, (list, tuple)) else ()
        left += [(i, depth + 1) for i in inner]
    return True


def messages(value: Any) -> list[dict[str, Any]]:
    """A conversation from any iterable of messages, or from a text, which is what the user says.

    Each has a role and a content, which becomes a text: it may be given as None beside calls of tools, or as
    a list of texts. Calls (`tool_calls`) and results (role `tool`) are as OpenAI's API has them; the
    arguments of a call become JSON text.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": text("The message", value)}]
    found = items("The conversation", value, f"messages: [{MESSAGE}]")
    if not found:
        raise UsageError("The conversation has no messages.", f"Give at least one: [{MESSAGE}].")
    return [_message(m) for m in found]


def begun(messages: list[dict[str, Any]]) -> str:
    """The text of an answer that goes on: the last of some messages, and not the only one."""
    last = messages[-1]
    if len(messages) < 2 or last["role"] != "assistant" or last.get("tool_calls") or not last["content"]:
        raise UsageError(
            "There is no answer to go on with.",
            "Let an answer of at least one character be the last message.",
        )
    return last["content"]


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise UsageError(f"{shown(given)} is not a message.", f"Use {MESSAGE}.")
    m = dict(given)
    calls = m.get("tool_calls")
    m["content"] = _content(given, bool(calls))
    for key in ("tool_call_id", "name"):
        if m.get(key) is not None:
            text(f"{key} of a message", m[key], empty=True)
    if calls:
        m["tool_calls"] = [_call(c) for c in items("tool_calls", calls, "calls")]
    else:
        m.pop("tool_calls", None)
    if len(m) > 2:  # what else a template may want is a stranger to us
        try:
            json.dumps(m, allow_nan=False)
            if not is_shallow(m):
                raise ValueError
        except (TypeError, ValueError, RecursionError):
            raise UsageError(
                "A message holds what no chat template can read.",
                "Use strings, numbers, booleans, None, lists and dicts, not too deep in each other.",
            ) from None
    return m


def _content(m: Mapping[str, Any], calls: bool) -> str:
    content = m.get("content")
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    parts = content if isinstance(content, (list, tuple)) and content else [None]
    texts = [
        p.get("text") if isinstance(p, Mapping) and p.get("type", "text") == "text" else None for p in parts
    ]
    if not all(isinstance(t, str) for t in texts):
        other = next(
            (p.get("type") for p in parts if isinstance(p, Mapping) and p.get("type") != "text"), None
        )
        if isinstance(other, str) and other != "text":
            raise UsageError(
                f"A message has a part of type {shown(other)}.", "Give texts; no model here reads others."
            )
        raise UsageError(f"{shown(m)} is not a message.", f"Use {MESSAGE}.")
    return "\n".join(t for t in texts if t is not None)


def are_calls(value: Any) -> bool:
    """Whether that is a list of calls as an answer has them, each with an id: for what comes from a file."""
    try:
        return isinstance(value, list) and all(_is_whole(_call(c), c) for c in value)
    except UsageError:
        return False


def _is_whole(read: dict[str, Any], given: dict[str, Any]) -> bool:
    function = given.get("function")
    return "id" in read and isinstance(function, dict) and isinstance(function.get("arguments"), str)


def _call(given: Any) -> dict[str, Any]:
    """A call in a message. Its arguments are an object, as JSON text or as such."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UsageError(f"{shown(given)} is not a call of a tool.", f"Use {CALL}.")
    value = function.get("arguments")
    try:
        value = json.loads(value, strict=False) if isinstance(value, str) and value.strip() else value or {}
        if not isinstance(value, Mapping):
            raise TypeError
        if not is_shallow(value):
            raise ValueError
        written = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        arguments = shown(function.get("arguments"))
        raise UsageError(
            f"A call of {name} has the arguments {arguments}, which are no JSON object.", f"Use {CALL}."
        ) from None
    out = {"type": "function", "function": {"name": name, "arguments": written}}
    return {"id": given["id"], **out} if isinstance(given.get("id"), str) else out
