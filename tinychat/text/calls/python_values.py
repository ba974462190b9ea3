"""Values as Python writes them, read without running anything."""

from __future__ import annotations

import ast
import math
import re
import warnings
from typing import Any

from tinychat.text.calls.json_text import DEEPEST, DamagedError

LONGEST = 1 << 20  # characters
_STRING = re.compile(r"""(\"{3}|'{3}).*?\1|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ESCAPED = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NAMES = {"true": True, "false": False, "null": None}  # as models write them that think in JSON


def read_value(text: str) -> Any:
    """A text, number, True, False, None, list, tuple or dict of such. Raises DamagedError for all else."""
    if len(text) > LONGEST or _depth(text) > DEEPEST:
        raise DamagedError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return _value(ast.parse(_STRING.sub(_on_one_line, text.strip()), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DamagedError from None


def written_value(value: Any) -> str:
    """A value of JSON as Python writes it; texts keep all characters but those that would end them."""
    if isinstance(value, str):
        return "'" + re.sub(r"[\\'\x00-\x1f\x7f]", _escaped, value) + "'"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written_value(k)}: {written_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written_value, value)) + "]"
    return repr(value)


def _on_one_line(match: re.Match[str]) -> str:
    """A string whose line breaks are escaped: models forget it, and so do templates."""
    return match[0] if match[1] else re.sub(r"[\n\r\x00]", _escaped, match[0])


def _escaped(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[0]) or f"\\x{ord(match[0]):02x}"


def _depth(text: str) -> int:
    """Brackets and signs in each other, at most."""
    depth = most = 0
    for c in text:
        if c in "([{-+~":
            depth += 1
            most = max(most, depth)
        elif c in ")]},":
            depth = max(0, depth - 1)
    return most


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | None):
            if isinstance(node.value, str):
                node.value.encode()  # no half of a surrogate pair
            elif isinstance(node.value, int):
                str(node.value)  # no more digits than can be written
            return node.value
        case ast.Constant(value=float() as number) if math.isfinite(number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_value(node.operand)
        case ast.Name() if node.id in _NAMES:
            return _NAMES[node.id]
        case ast.List() | ast.Tuple():
            return [_value(e) for e in node.elts]
        case ast.Dict():
            return _dict(node)
    raise DamagedError


def _dict(node: ast.Dict) -> dict[str, Any]:
    keys = [None if key is None else _value(key) for key in node.keys]
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise DamagedError
    return dict(zip(keys, (_value(v) for v in node.values), strict=True))  # type: ignore[arg-type]
