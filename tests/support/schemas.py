"""JSON schemas: some as people write them, and as many random ones as anybody wants."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def obj(required: list[str] | None = None, closed: bool = True, **properties: Schema) -> Schema:
    """An object with these properties, all of them required unless it is said which."""
    needed = list(properties) if required is None else required
    more = {"additionalProperties": False} if closed else {}
    return {"type": "object", "properties": properties, "required": needed, **more}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}

WRITTEN: list[Schema] = [
    obj(name={"type": "string", "maxLength": 20}, age={"type": "integer", "minimum": 0, "maximum": 120}),
    obj(
        ["id"],
        id={"type": "integer", "minimum": 1, "maximum": 9999},
        note={"type": "string", "maxLength": 30},
    ),
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, None, True, "été", ["a"], {"b": 1}]},
    {"const": {"kind": "fixed", "values": [1, None, '"quoted" \\ \u20ac']}},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["integer", "null"], "minimum": -3, "maximum": 3},
    {"type": "integer", "minimum": -17, "maximum": 4},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 102},
    {"type": "number", "minimum": 0.25, "maximum": 1.5},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    {"type": "string", "pattern": "^(foo|bar)+$", "maxLength": 12},
    {"type": "string", "pattern": "b{2}", "maxLength": 9},
    {"type": "string", "pattern": "^\\d{4}$"},
    {"type": "string", "pattern": "^[\\w.]{1,8}@x\\.org$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email", "maxLength": 40},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3, "maxItems": 3},
    {"type": "array", "prefixItems": [{"enum": ["x"]}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 2},
    obj(choice={"anyOf": [{"type": "boolean"}, {"enum": ["yes", "no"]}, {"type": "null"}]}),
    {"anyOf": [obj(a={"type": "boolean"}), obj(b={"enum": [1, 2]})]},
    {
        "oneOf": [
            obj(t={"const": "cat"}, lives={"enum": [7, 9]}),
            obj(t={"const": "dog"}, good={"const": True}),
        ]
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    {
        "$defs": {"point": obj(x={"enum": [0, 1]}, y={"enum": [0, 1]})},
        **obj(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    {
        "definitions": {"tree": {"anyOf": [{"type": "null"}, obj(left={"$ref": "#/definitions/tree"})]}},
        "$ref": "#/definitions/tree",
    },
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": {"enum": [1, 2]}},
        "additionalProperties": False,
    },
    obj(["kind"], closed=False, kind={"const": "open"}),
    {
        "title": "Reply",
        "description": "As pydantic writes one.",
        "type": "object",
        "properties": {
            "ok": {"title": "Ok", "default": True, "type": "boolean"},
            "level": {"$ref": "#/$defs/Level"},
            "detail": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}], "default": None},
        },
        "required": ["ok", "level"],
        "additionalProperties": False,
        "$defs": {"Level": {"enum": ["low", "high"], "type": "string"}},
    },
]


def drawn(rng: random.Random, depth: int = 3) -> Schema:
    """A random schema whose values are small."""
    simple = [_integer, _number, _string, _pattern, _enum, _boolean, _format]
    nested = [_object, _object, _array, _tuple, _any_of]
    return rng.choice(simple + nested * 2 if depth else simple)(rng, depth - 1)


def with_definitions(rng: random.Random, depth: int = 2) -> Schema:
    """A random schema in which parts refer to shared ones."""
    shared = {f"d{i}": drawn(rng, 1) for i in range(rng.randint(1, 3))}
    names = list(shared)
    parts = {f"p{i}": {"$ref": f"#/$defs/{rng.choice(names)}"} for i in range(rng.randint(1, 3))}
    return {"$defs": shared, **obj(own=drawn(rng, depth), **parts)}


def corpus(n: int, seed: int = 0) -> list[Schema]:
    """The written ones, and random ones up to n."""
    rng = random.Random(seed)
    more = (with_definitions(rng) if i % 5 == 0 else drawn(rng) for i in range(n))
    return [*WRITTEN, *more][:n]


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.choice([-1000, -10, -1, 0, 1, 7, 99])
    return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 1, 9, 10, 12345])}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.choice([-2.5, -1, 0, 0.125, 3, 99.9])
    return {
        "type": "number",
        "minimum": low,
        rng.choice(["maximum", "exclusiveMaximum"]): low + rng.choice([0.5, 1, 20]),
    }


def _string(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)}


def _pattern(rng: random.Random, depth: int) -> Schema:
    parts = [
        "[a-z]{1,5}",
        "\\d{2}",
        "(x|yz){1,3}",
        "-",
        '[^"a-z]{1,2}',
        "\\.",
        "é?",
        "[A-Fa-f0-9]{4}",
        "\\s?",
    ]
    return {"type": "string", "pattern": "^" + "".join(rng.choices(parts, k=rng.randint(1, 4))) + "$"}


def _enum(rng: random.Random, depth: int) -> Schema:
    known = ["a", "b c", 'ä"', "", 0, -1, 2.5, None, True, False, [], {"k": [1]}, "日本", "\\n"]
    return {"enum": rng.sample(known, rng.randint(1, 4))}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _format(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4", "duration"])}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "x y", "ключ", "a-b", "value", "_", "n0"], rng.randint(1, 4))
    required = [n for n in names if rng.random() < 0.6]
    return obj(required, True, **{n: drawn(rng, depth) for n in names})


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": drawn(rng, depth), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [drawn(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [drawn(rng, depth) for _ in range(rng.randint(1, 3))]}
