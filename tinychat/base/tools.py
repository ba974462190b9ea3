"""Tools that a model may call: functions of Python, or schemas as OpenAI's API has them."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tinychat.base.arguments import choice, is_shallow, items, shown
from tinychat.base.errors import UsageError

MOST_TOOLS = 512
LONGEST_SCHEMAS = 1 << 20  # characters of all of them, as JSON
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
CHOICES = ("auto", "none", "required")
_HOW = 'Give a function, or {"type": "function", "function": {"name": …, "parameters": {…}}}.'
_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
# Sections of a docstring in Google's style.
_SECTION = re.compile(
    r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):[ \t]*$", re.MULTILINE
)
_ARGUMENT = re.compile(r"^([ \t]+)\*{0,2}(\w+)(?:[ \t]*\([^()\n]*\))?:[ \t]*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(\[.*?\])\)\s*$", re.IGNORECASE)


def tools(value: Any) -> list[dict[str, Any]]:
    """Tools from an iterable of functions and schemas, in OpenAI's form. Raises UsageError."""
    given = [] if value is None else items("tools", value, "functions or schemas")
    if len(given) > MOST_TOOLS:
        raise UsageError(f"There are {len(given):,} tools.", f"Give {MOST_TOOLS}, at most.")
    found = [_tool(t) for t in given]
    names: set[str] = set()
    for tool in found:
        if (name := tool["function"]["name"]) in names:
            raise UsageError(f"Two tools have the name {name}.", "Give each a name of its own.")
        names.add(name)
    try:
        if not is_shallow(found):
            raise ValueError
        length = len(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise UsageError(
            "A tool's schema holds what JSON cannot, or is too deep.",
            "Use strings, finite numbers, booleans, None, lists and dicts.",
        ) from None
    if length > LONGEST_SCHEMAS:
        raise UsageError(
            f"The tools have {length:,} characters.", f"Give {LONGEST_SCHEMAS:,} characters, at most."
        )
    return found


def tool_choice(value: Any, given: list[dict[str, Any]]) -> str:
    """ "auto", "none", "required", or the name of the tool that must be called, which OpenAI's form may have.

    given: what `tools` gave. Raises UsageError.
    """
    if isinstance(value, Mapping):
        function = value.get("function", value)
        value = function.get("name") if isinstance(function, Mapping) else None
    names = [t["function"]["name"] for t in given]
    choice("tool_choice", value, (*CHOICES, *names), f"Use {', '.join(CHOICES)}, or the name of a tool.")
    if value == "required" and not names:
        raise UsageError("A call is required, and there are no tools.", "Give tools.")
    return value


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """A tool's schema from a function's type hints and its docstring in Google's style.

    Descriptions of arguments may end with `(choices: ["a", "b"])`. Raises UsageError for an argument whose
    type JSON does not have.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function if inspect.isroutine(function) else type(function).__call__)
    except (TypeError, ValueError, NameError) as e:
        raise UsageError(
            f"The arguments of {name} cannot be read: {e}.", "Give its schema in its place."
        ) from e
    about, described = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for i, (key, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UsageError(f"The argument {key} of {name} cannot be given by its name.", "Give it one.")
        if i == 0 and key in ("self", "cls") and key not in hints:
            continue
        if key not in hints:
            raise UsageError(f"The argument {key} of {name} has no type.", "Write its type: `x: int`.")
        properties[key] = _schema(hints[key], key, name)
        if parameter.default is parameter.empty:
            required.append(key)
        text = described.get(key, "")
        if match := _CHOICES.search(text):
            properties[key]["enum"] = _choices(match[1], key, name)
            text = text[: match.start()].strip()
        if text:
            properties[key]["description"] = text
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _tool(value: Any) -> dict[str, Any]:
    if callable(value):
        value = schema_of(value)
    if not isinstance(value, Mapping):
        raise UsageError(f"{shown(value)} is no tool.", _HOW)
    function = value.get("function", value)
    if not isinstance(function, Mapping) or value.get("type", "function") != "function":
        raise UsageError(f"{shown(value)} is no tool.", _HOW)
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(
            f"A tool has the name {shown(name)}.", "Use letters, digits, and _ . : / - after the first."
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise UsageError(
            f"The parameters of {name} are no schema of an object.", 'Use {"type": "object", …}.'
        )
    about = function.get("description")
    if about is not None and not isinstance(about, str):
        raise UsageError(f"The description of {name} is {shown(about)}.", "Give a text.")
    out: dict[str, Any] = {"name": name, "description": about or "", "parameters": dict(parameters)}
    if function.get("strict") is True:
        out["strict"] = True
    return {"type": "function", "function": out}


def _schema(hint: Any, key: str, name: str) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _schema(args[0], key, name)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _values([member.value for member in hint], key, name)
    if origin is typing.Literal:
        return _values(list(args), key, name)
    if origin in (typing.Union, types.UnionType):
        return _union(args, key, name)
    if origin is list:
        return {"type": "array", "items": _schema(args[0], key, name)}
    if origin is tuple and ... not in args:
        return {"type": "array", "prefixItems": [_schema(a, key, name) for a in args]}
    if origin is tuple:
        return {"type": "array", "items": _schema(args[0], key, name)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], key, name)}
    try:
        return dict(_TYPES[hint])
    except (KeyError, TypeError):
        raise UsageError(
            f"The argument {key} of {name} has the type {shown(hint)}, which JSON does not have.",
            "Use str, int, float, bool, list, dict, Literal or an Enum, or give the tool's schema.",
        ) from None


def _union(args: tuple[Any, ...], key: str, name: str) -> dict[str, Any]:
    each = [_schema(a, key, name) for a in args if a is not type(None)]
    if len(each) == 1:
        out: dict[str, Any] = each[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in each):
        named = sorted({s["type"] for s in each})
        out = {"type": named[0] if len(named) == 1 else named}
    else:
        out = {"anyOf": each}
    return {**out, "nullable": True} if type(None) in args else out


def _values(values: list[Any], key: str, name: str) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_TYPES.get(type(v), {}).get("type") for v in values))
    if None in kinds or not kinds or {"array", "object"} & set(kinds):
        raise UsageError(
            f"The argument {key} of {name} has values that are no texts, numbers or booleans.",
            "Give the tool's schema.",
        )
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _choices(text: str, key: str, name: str) -> list[Any]:
    try:
        return [c.strip() if isinstance(c, str) else c for c in json.loads(text)]
    except ValueError:
        raise UsageError(
            f"The choices of {key} in {name} are no JSON: {shown(text)}.", "Write a list."
        ) from None


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of a function, and of its arguments."""
    parts = _SECTION.split(text)
    described: dict[str, str] = {}
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        if section in ("Args", "Arguments", "Parameters"):
            indent, last = None, ""
            for line in body.splitlines():
                match = _ARGUMENT.match(line)
                if match and (indent is None or match[1] == indent):
                    indent, last = match[1], match[2]
                    described[last] = match[3].strip()
                elif last and line.strip():
                    described[last] = f"{described[last]} {line.strip()}".strip()
    return parts[0].strip(), described
