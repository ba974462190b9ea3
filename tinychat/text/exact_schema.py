"""Rewriting a JSON schema where llguidance 1.9 would let through what the schema forbids.

What comes out allows a little less than what went in, and nothing else. `tests/text/test_grammar.py` has the
cases; where a newer llguidance passes them without, this can go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LITERAL = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
# Plain text, an escape, or a class of characters: one after the other, they read a pattern in linear time.
_PIECE = re.compile(r"[^\\\[]+|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def exact(part: Any) -> Any:
    """A schema, or a part of one, that is held to as it says."""
    if isinstance(part, (list, tuple)):
        return [exact(p) for p in part]
    if not isinstance(part, Mapping):
        return part
    out = {k: v if k in LITERAL else exact(v) for k, v in part.items()}
    if isinstance(pattern := out.get("pattern"), str):
        out["pattern"] = _without_quotes(pattern)
    if isinstance(patterns := out.get("patternProperties"), Mapping):
        out["patternProperties"] = {_without_quotes(str(k)): v for k, v in patterns.items()}
    return _with_inner_bounds(out)


def _without_quotes(pattern: str) -> str:
    """A pattern whose classes of characters forbid a quote and a backslash where they say so: one that has
    control characters lets both through, written as escapes. So it gets none.
    """
    out, at = [], 0
    while (found := _PIECE.match(pattern, at)) is not None:  # ends where a class does not
        at, piece = found.end(), found[0]
        out.append(rf"[{piece}&&[^\x00-\x1F]]" if piece[0] == "[" and _leaks(piece) else piece)
    return "".join(out) + pattern[at:]


def _leaks(characters: str) -> bool:
    """Whether a class has control characters, and not both a quote and a backslash."""
    try:
        known = re.compile(characters)
    except (re.error, RecursionError, OverflowError):  # what Python does not know, such as \\p{L}
        return characters.startswith("[^") and ('"' in characters or "\\\\" in characters)
    return bool(known.match("\x01") and not (known.match('"') and known.match("\\")))


def _with_inner_bounds(part: dict[str, Any]) -> dict[str, Any]:
    """Bounds without an integer that excludes itself where both have one integral part, as -2.5 and -2: it is
    taken for one that does not. It is moved by a billionth.
    """
    low = max(_numbers(part, "minimum", "exclusiveMinimum"), default=None)
    high = min(_numbers(part, "maximum", "exclusiveMaximum"), default=None)
    if low is None or high is None or max(abs(low), abs(high)) > 1e6 or int(low) != int(high):
        return part
    moved = {}
    for name, step in (("exclusiveMinimum", 1e-9), ("exclusiveMaximum", -1e-9)):
        for bound in _numbers(part, name):
            if bound == int(bound):
                moved[name] = float(f"{bound + step:.9f}")
    return {**part, **moved}


def _numbers(part: dict[str, Any], *names: str) -> list[float]:
    found = (part.get(name) for name in names)
    return [v for v in found if isinstance(v, (int, float)) and not isinstance(v, bool)]
