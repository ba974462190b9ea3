"""What the form of an answer may be asked for as, and what is refused before anything else looks at it."""

from __future__ import annotations

import json
import time

import pytest

from tinychat.base.errors import UsageError
from tinychat.text.response_format import Form, of_schema, response_format

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_openais_forms_and_ours_are_known():
    inner = {"name": "x", "strict": True, "schema": SCHEMA}
    for value in (
        {"type": "json_schema", "json_schema": inner},
        {"type": "json_schema", **inner},  # as /v1/responses has it
        {"type": "json_schema", "json_schema": {"schema": json.dumps(SCHEMA)}},
        of_schema(SCHEMA),
    ):
        assert response_format(value) == Form("json_schema", json.dumps(SCHEMA))
    assert response_format(None) is response_format({"type": "text"}) is None
    assert response_format({"type": "json_object"}) == Form("json_schema", '{"type": "object"}')
    assert response_format({"type": "regex", "pattern": "a+"}) == Form("regex", "a+")
    assert response_format({"type": "grammar", "grammar": "start: /a/"}) == Form("lark", "start: /a/")
    assert response_format({"type": "choice", "choices": ["a", 'b"']}) == Form("lark", 'start: "a" | "b\\""')


def deep(n):
    return '{"items":' * n + "{}" + "}" * n


@pytest.mark.parametrize(
    "value",
    [
        7,
        [],
        {},
        {"type": "foo"},
        {"type": ["regex"]},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "json_schema": {"schema": None}},
        {"type": "json_schema", "json_schema": {"schema": "{"}},
        {"type": "json_schema", "json_schema": {"schema": '{"const": NaN}'}},
        {"type": "json_schema", "json_schema": {"schema": {"const": float("inf")}}},
        {"type": "json_schema", "json_schema": {"schema": {"const": {1, 2}}}},
        {"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}},
        {"type": "json_schema", "json_schema": {"schema": deep(101)}},
        {"type": "json_schema", "json_schema": {"schema": deep(100_000)}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 300_000]}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(300_000))}}},
        {"type": "json_schema", "json_schema": {"schema": {"allOf": [{"$ref": "#"}] * 1001}}},
        {
            "type": "json_schema",
            "json_schema": {"schema": {"properties": {f"p{i}": {} for i in range(1001)}}},
        },
        {"type": "regex"},
        {"type": "regex", "pattern": ""},
        {"type": "regex", "pattern": "\ud800"},
        {"type": "regex", "pattern": "a" * 300_000},
        {"type": "choice"},
        {"type": "choice", "choices": []},
        {"type": "choice", "choices": "abc"},
        {"type": "choice", "choices": [1]},
        {"type": "grammar", "grammar": "\n" * 1001},
    ],
)
def test_whatever_is_no_form_or_too_large_is_refused_in_two_lines(value):
    began = time.process_time()
    with pytest.raises(UsageError) as e:
        response_format(value)
    assert e.value.what.endswith(".")
    assert len(e.value.what) < 400
    assert e.value.todo
    assert time.process_time() - began < 2


def test_a_schema_that_contains_itself_is_refused():
    schema: dict = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(UsageError, match="deeper than"):
        of_schema(schema)


def test_a_schema_cannot_loosen_what_it_is_held_to():
    form = of_schema({"type": "integer", "x-guidance": {"lenient": True, "whitespace_pattern": "x*"}})
    assert form == of_schema({"type": "integer"})
