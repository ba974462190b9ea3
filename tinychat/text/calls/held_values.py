"""Grammar of values as Gemma writes them: texts in quotes of their own, keys without any.

Held are types, choices, properties and what is required; not lengths, ranges and patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinychat.text.calls.syntax import as_json

_WORDS = {
    "integer": "/-?(0|[1-9][0-9]{0,17})/",
    "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/",
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_ANY = ("string", "number", "boolean", "null", "array", "object")
DEEPEST = 8  # levels of values of any kind


def in_order(name: str, parts: Sequence[tuple[str, bool]], separator: str) -> list[str]:
    """Rules of which `{name}_first0` has these parts in their order, those left out that are not required."""
    rules = []
    # What may come where nothing came before (first) and behind something (more), from each part on.
    for i, (part, required) in enumerate(parts):
        said = f"{part} {name}_more{i + 1}"
        skip = "" if required else f" | {name}_%s{i + 1}"
        rules.append(f"{name}_first{i}: {said}" + skip.replace("%s", "first"))
        rules.append(f"{name}_more{i}: {as_json(separator)} {said}" + skip.replace("%s", "more"))
    return [*rules, *(f'{name}_{which}{len(parts)}: ""' for which in ("first", "more"))]


class Values:
    """Rules for values. root: the schema that `$ref` points into; lark: a text as a sequence of Lark."""

    def __init__(self, quote: str, root: Mapping[str, Any], lark: Callable[[str], str], name: str):
        self.rules: list[str] = []
        self._quote, self._root, self._lark, self._name = lark(quote), root, lark, name
        self._token = self._quote.startswith("<[")
        self._known: dict[str, str] = {}
        self._n = 0

    def rule(self, schema: Any, depth: int = 0) -> str:
        """Name of a rule that a value of this schema has."""
        if isinstance(schema, Mapping) and isinstance(ref := schema.get("$ref"), str):
            if ref not in self._known:
                self._known[ref] = name = self._new()
                self.rules.append(f"{name}: {self.rule(self._target(ref), depth)}")
            return self._known[ref]
        name = self._new()
        self.rules.append(f"{name}: {self._body(schema if isinstance(schema, Mapping) else {}, name, depth)}")
        return name

    def _new(self) -> str:
        self._n += 1
        return f"{self._name}_{self._n}"

    def _target(self, ref: str) -> Any:
        value: Any = self._root
        for key in ref.removeprefix("#").strip("/").split("/"):
            value = (
                value.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(value, Mapping) else None
            )
        return value

    def _body(self, schema: Mapping[str, Any], name: str, depth: int) -> str:
        given = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
        if isinstance(given, list) and given:
            return " | ".join(self._fixed(v) for v in given)
        for key in ("anyOf", "oneOf"):
            if isinstance(each := schema.get(key), list) and each:
                return " | ".join(self.rule(s, depth + 1) for s in each)
        kinds = schema.get("type", _ANY)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if depth > DEEPEST:
            kinds = [k for k in kinds if k not in ("array", "object")] or ["null"]
        return " | ".join(self._of(kind, schema, f"{name}_{i}", depth) for i, kind in enumerate(kinds))

    def _of(self, kind: str, schema: Mapping[str, Any], name: str, depth: int) -> str:
        if kind == "string":
            end = "" if self._token else f"[suffix={self._quote}]"
            self.rules.append(
                f"{name}{end}: {name.upper()}\n{name.upper()}: /(?s:.*)/"
                if self._token
                else f"{name}{end}: /(?s:.*)/"
            )
            return f"{self._quote} {name}" + (f" {self._quote}" if self._token else "")
        if kind == "array":
            if isinstance(fixed := schema.get("prefixItems"), list):
                items = ' "," '.join(self.rule(s, depth + 1) for s in fixed)
                return f'"[" {items} "]"'
            item = self.rule(schema.get("items"), depth + 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        if kind == "object":
            return self._object(schema, name, depth)
        self.rules.append(f"{name}: {_WORDS.get(kind, _WORDS['null'])}")
        return name

    def _object(self, schema: Mapping[str, Any], name: str, depth: int) -> str:
        properties = schema.get("properties")
        if not properties and (not depth or schema.get("additionalProperties") is False):
            return '"{" "}"'
        if not isinstance(properties, Mapping) or not properties:
            value = self.rule(schema.get("additionalProperties", {}), depth + 1)
            return f'"{{" "}}" | "{{" /[a-z_]{{1,40}}/ ":" {value} "}}"'
        required = schema.get("required", ())
        parts = [
            (f"{self._lark(f'{key}:')} {self.rule(value, depth + 1)}", key in required)
            for key, value in properties.items()
        ]
        self.rules += in_order(name, parts, ",")
        return f'"{{" {name}_first0 "}}"'

    def _fixed(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {self._lark(value)} {self._quote}"
        return self._lark(as_json(value))
