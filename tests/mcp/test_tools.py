"""Tools and results as strangers make them: bounded, without control characters, with names of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tinychat.base import tools as checked_tools
from tinychat.mcp.tools import Listed, cut, named, read_listed, result_of

OBJECT = {"type": "object", "properties": {}}


def test_names_are_such_that_every_model_can_write_them_and_no_two_are_alike():
    odd = [Listed(n, "", OBJECT) for n in ("a b", "a_b", "é", "x" * 100, "-", "a/b")]
    tools = named([("one", "1", odd), ("two", "2", [Listed("a b", "", OBJECT), Listed("only", "", OBJECT)])])
    called = [t.called for t in tools]
    assert len(set(called)) == len(called)
    assert called[-1] == "only"
    assert "two_a_b" in called
    assert len(checked_tools.tools([t.as_openai() for t in tools])) == len(tools)
    assert max(map(len, called)) <= 64


def test_no_more_than_a_model_can_be_told_of():
    many = [(f"s{i}", "", [Listed(f"tool {n}", "", OBJECT) for n in range(200)]) for i in range(10)]
    assert len(checked_tools.tools([t.as_openai() for t in named(many)])) == 512
    long = [(f"s{i}", "", [Listed("a", "x" * 4096, {**OBJECT, "x": "y" * 30_000})]) for i in range(50)]
    tools = named(long)
    assert 10 < len(tools) < 20
    checked_tools.tools([t.as_openai() for t in tools])


def test_a_tool_whose_words_or_server_change_is_another_one():
    def digest(identity="1", about="Adds.", schema=OBJECT, server="one"):
        return named([(server, identity, [Listed("add", about, schema)])])[0].digest

    other = [
        digest("2"),
        digest(about="Adds!"),
        digest(schema={**OBJECT, "required": []}),
        digest(server="two"),
    ]
    assert digest() == digest()
    assert len({digest(), *other}) == 5


@pytest.mark.parametrize("schema", [
    None, [], 3, {"type": "string"}, {"type": "object", "x": "y" * 50_000}, {"type": "object", "x": 1e400},
])  # fmt: skip
def test_a_schema_that_makes_no_sense_is_no_tool(schema):
    assert read_listed("a", "b", schema) is None


def test_descriptions_and_schemas_are_harmless_and_bounded():
    evil = {"type": "object", "properties": {"a\x1b[2J": {"type": "string", "description": "b\u202ec\ud800"}}}
    tool = read_listed("add", "x\x1b[31m" * 5000, evil)
    assert len(tool.description) <= 4096
    said = f"{tool.description}{tool.schema}"
    assert not any(c in said for c in "\x1b\u202e\ud800")
    assert read_listed("", "b", OBJECT) is None
    assert read_listed("a", None, {"type": "object"}).schema == OBJECT


def part(**fields):
    return SimpleNamespace(**fields)


def test_results_are_text_and_what_is_none_is_named():
    parts = [
        part(type="text", text="a\x1b[2Jb"),
        part(type="image", mime_type="image/png", data="x" * 1000),
        part(type="resource", resource=part(text="c", mime_type="text/plain")),
        part(type="resource", resource=part(blob="…", mime_type=None, uri="file:///x\n(evil")),
        part(type="resource_link", uri="https://x"),
    ]
    text = result_of(parts).text
    assert "\x1b" not in text
    first, image, inner, blob, link = text.split("\n")
    assert (image, inner) == ("[image: image/png, which is not shown]", "c")
    assert blob.startswith("[resource: file:///x")
    assert link == "[resource_link: https://x, which is not shown]"
    assert first.startswith("a")
    assert result_of([], {"a": 1}).text == '{"a": 1}'
    assert result_of([part(type="text", text="x")], failed=True).text == "Error: x"


def test_a_result_is_cut_to_what_the_context_can_bear():
    assert cut("x" * 2000, 100) == "x" * 2000
    long = cut("x" * 100_000, 8192)
    assert long.startswith("x" * 8192 + "\n(cut: the result has 100,000 characters")
    assert len(cut("x" * 100_000, 0)) < 66_000
