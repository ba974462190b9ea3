"""Schemas of functions, against transformers' `get_json_schema`."""

from __future__ import annotations

import enum
from typing import Any, Literal, Optional, Union

import pytest

from tinychat.base.errors import UsageError
from tinychat.base.tools import schema_of, tools


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def plain(a: int, b: float, c: str, d: bool = True):
    """Does it.

    More of it.

    Args:
        a: The first.
        b: The second,
            on two lines.
        c: The third: with a colon.
        d (bool, optional): The last.

    Returns:
        Nothing.
    """


def nested(a: list[int], b: dict[str, list[str]], c: tuple[int, str], d: Any, e: list, f: dict):
    """Nested.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
        e: E.
        f: F.
    """


def unions(a: Optional[str], b: Union[int, str], c: int | None = None, d: Union[list[int], str, None] = None):  # noqa: UP007, UP045
    """Unions.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
    """


def chosen(a: Literal["x", "y"], b: Literal[1, "z"], c: Colour, d: str = "tea"):
    """Choices.

    Args:
        a: A.
        b: B.
        c: C.
        d: A drink (choices: ["tea", "coffee"])
    """


class Thing:
    def method(self, a: int) -> int:
        """A method.

        Args:
            a: A.
        """
        return a


@pytest.mark.parametrize("function", [plain, nested, unions, chosen, Thing().method, Thing.method])
def test_schemas_are_those_of_transformers(function):
    get_json_schema = pytest.importorskip("transformers.utils").get_json_schema
    if function is plain:  # it does not know types in parentheses
        plain.__doc__ = plain.__doc__.replace(" (bool, optional)", "")
    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    assert schema_of(function) == expected


def test_a_type_in_parentheses_and_what_is_not_described():
    def f(a: int, b: int):
        """Does it.

        Args:
            a (int): The first.
        """

    properties = schema_of(f)["function"]["parameters"]["properties"]
    assert properties == {"a": {"type": "integer", "description": "The first."}, "b": {"type": "integer"}}

    def bare(x: int):
        pass

    assert schema_of(bare)["function"] == {
        "name": "bare",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    }


def untyped(x):
    pass


def of_a_class(x: Thing):
    pass


def many(*x: int):
    pass


def by_place(x: int, /):
    pass


def bad_choices(x: str):
    """Does it.

    Args:
        x: X (choices: [tea])
    """


SENSELESS = [untyped, of_a_class, many, by_place, bad_choices, int]


@pytest.mark.parametrize("function", SENSELESS, ids=lambda f: f.__name__)
def test_what_has_no_schema_is_refused_in_words(function):
    with pytest.raises(UsageError) as e:
        tools([function])
    assert function.__name__ in e.value.what
    assert e.value.todo


def test_a_hundred_thousand_tools_are_refused_before_they_are_looked_at():
    looked = []

    class Tool(dict):
        def get(self, *args):
            looked.append(1)
            return super().get(*args)

    with pytest.raises(UsageError, match="100,000 tools"):
        tools([Tool(name=f"f{i}") for i in range(100_000)])
    assert not looked


def test_numbers_that_json_does_not_have_are_no_part_of_a_schema():
    for number in (float("inf"), float("nan")):
        with pytest.raises(UsageError):
            tools([{"name": "f", "parameters": {"type": "object", "maximum": number}}])


def test_openai_s_form_and_the_bare_one_are_the_same():
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    assert tools([bare]) == tools([{"type": "function", "function": bare}]) == tools([{"function": bare}])
    assert tools([{"name": "f"}]) == [
        {"type": "function", "function": {**bare, "description": ""}},
    ]
    assert tools([{**bare, "strict": True}])[0]["function"]["strict"] is True
    assert "strict" not in tools([{**bare, "strict": None}])[0]["function"]
