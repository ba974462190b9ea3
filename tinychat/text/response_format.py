"""What the form of an answer may be asked for as: a JSON schema, a regular expression, some texts, a grammar.

Everything here is a stranger's. Size and depth are bounded before anything else looks at it; whether it means
something is found out by `tinychat.text.grammar`, before anything is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tinychat.base import arguments
from tinychat.base.errors import UsageError
from tinychat.text.exact_schema import exact

LONGEST = 1 << 18  # characters of one, written as text
MOST_REFERENCES = 1000  # `$ref` of a schema, rules of a grammar: they are followed by recursion
MOST_TERMINALS = 200  # of a grammar: each may be as costly as llguidance allows
MOST_PROPERTIES = 1000  # of one object of a schema

Kind = Literal["json_schema", "regex", "lark"]
FORMS = (
    '{"type": "json_schema", "json_schema": {"schema": …}}, {"type": "json_object"}, '
    '{"type": "regex", "pattern": …}, {"type": "choice", "choices": […]} or {"type": "grammar", "grammar": …}'
)


@dataclass(frozen=True)
class Form:
    """What an answer has to look like, as text: a JSON schema, a regular expression, or a grammar in
    llguidance's dialect of Lark. throughout: it says of thoughts, too, and begins with the first token.
    """

    kind: Kind
    text: str
    throughout: bool = False


def response_format(value: Any) -> Form | None:
    """The form that is asked for, in OpenAI's words or ours; None for `{"type": "text"}` and None.

    Raises UsageError where it is none of FORMS, or too large. A Form is believed.
    """
    if value is None or isinstance(value, Form):
        return value
    if not isinstance(value, Mapping) or not isinstance(kind := value.get("type"), str):
        raise UsageError(f"response_format is {arguments.shown(value)}.", f"Use {FORMS}.")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json_schema", '{"type": "object"}')
    if kind == "json_schema":
        inner = value.get("json_schema", value)  # as chat completions have it, and as responses do
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise UsageError(
                "response_format has no schema.",
                'Use {"type": "json_schema", "json_schema": {"schema": …}}.',
            )
        return of_schema(inner["schema"])
    if kind == "regex":
        return _bounded(Form("regex", _text(value, "pattern")))
    if kind == "choice":
        return _choice(value.get("choices"))
    if kind == "grammar":
        form = _bounded(Form("lark", _text(value, "grammar")))
        for most, what, found in (
            (MOST_REFERENCES, "lines", form.text.count("\n")),
            (MOST_TERMINALS, "terminals", len(re.findall(r"^\s*_*[A-Z]", form.text, re.MULTILINE))),
        ):
            if found > most:
                raise UsageError(f"The grammar has more than {most} {what}.", "Use a smaller one.")
        return form
    raise UsageError(f"response_format has the type {arguments.shown(kind)}.", f"Use {FORMS}.")


def of_schema(schema: Any) -> Form:
    """The form of a JSON schema: an object or a boolean, or its text."""
    if isinstance(schema, str):
        if len(schema) > LONGEST:
            raise _too_large("schema")
        try:
            schema = json.loads(schema, parse_constant=_no_constant)
        except (ValueError, RecursionError) as e:
            raise UsageError(f"The schema is not JSON: {_one_line(e)}.", "Give a JSON schema.") from None
    if not isinstance(schema, (Mapping, bool)):
        raise UsageError(f"The schema is {arguments.shown(schema)}.", "Give an object: a JSON schema.")
    if isinstance(schema, bool):  # anything, or nothing
        schema = {} if schema else {"enum": []}
    _measure(schema)
    # What llguidance's own key says would loosen what is held to.
    schema = exact({k: v for k, v in schema.items() if k != "x-guidance"})
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(
            f"The schema is not JSON: {_one_line(e)}.",
            "Use strings, finite numbers, booleans, None, lists, dicts.",
        ) from None
    return _bounded(Form("json_schema", text))


def _choice(choices: Any) -> Form:
    texts = arguments.texts("choices", choices)
    if not texts or isinstance(choices, str):
        raise UsageError(f"choices is {arguments.shown(choices)}.", "Give a list of texts, at least one.")
    return _bounded(Form("lark", "start: " + " | ".join(json.dumps(t) for t in dict.fromkeys(texts))))


def _text(value: Mapping[str, Any], name: str) -> str:
    text = arguments.text(name, value.get(name))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} has half a character in it.", "Use Unicode text.") from None
    return text


def _bounded(form: Form) -> Form:
    if len(form.text) > LONGEST:
        raise _too_large({"json_schema": "schema", "lark": "grammar"}.get(form.kind, "expression"))
    return form


def _too_large(what: str) -> UsageError:
    return UsageError(f"The {what} has more than {LONGEST:,} characters.", "Use a smaller one.")


def _measure(schema: Any) -> None:
    """Raise UsageError where a schema is too deep or too large, without recursion."""
    references, left = 0, [("#", schema, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > arguments.DEEPEST:
            raise UsageError(
                f"The schema is nested deeper than {arguments.DEEPEST} levels.", "Use a flatter one."
            )
        if isinstance(value, Mapping):
            if isinstance(found := value.get("properties"), Mapping) and len(found) > MOST_PROPERTIES:
                raise UsageError(
                    f"The schema has {len(found)} properties at {place}; {MOST_PROPERTIES} are possible.",
                    "Use fewer.",
                )
            references += "$ref" in value
            _refuse_counting(place, value)
            left += [(f"{place}/{escaped(k)}", v, depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{place}/{i}", v, depth + 1) for i, v in enumerate(value)]
        if len(left) > LONGEST:
            raise _too_large("schema")
    if references > MOST_REFERENCES:
        raise UsageError(f"The schema has more than {MOST_REFERENCES} references.", "Use fewer.")


def _refuse_counting(place: str, value: Mapping[str, Any]) -> None:
    """Raise UsageError where properties of any name are to be counted: the same name could come twice."""
    least, required = value.get("minProperties"), value.get("required")
    named = len(required) if isinstance(required, (list, tuple)) else 0
    closed = value.get("additionalProperties") is False and not value.get("patternProperties")
    if isinstance(least, int) and least > named and not closed:
        raise UsageError(
            f"The schema cannot be held to at {place}: minProperties counts properties of any name.",
            'Name them under "required", or say "additionalProperties": false.',
        )


def escaped(key: Any) -> str:
    """A key as a JSON pointer has it."""
    return str(key)[:100].replace("~", "~0").replace("/", "~1")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__
