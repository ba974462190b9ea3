"""Data from a file or another process, checked against the dataclass that it should be.

Types are read from the annotations: adding a field to a dataclass is enough. Loads nothing heavy.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Reader = Callable[[Any, bool], Any]


def read(cls: type[T], given: Any, *, strangers: bool = False) -> T:
    """An instance of a dataclass from a mapping of its fields; those with a default may be missing.

    strangers: fields that it does not have are left out, as a newer program may send them. Raises ValueError
    that names the field for whatever is missing, unknown or of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"no {cls.__name__}")
    known = readers(cls)
    if not strangers and (unknown := [str(name) for name in given if name not in known]):
        raise ValueError(f"unknown field {unknown[0][:50]}")
    out = {}
    for name, (reader, needed) in known.items():
        if name in given:
            try:
                out[name] = reader(given[name], strangers)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
        elif needed:
            raise ValueError(f"{name} is missing")
    return cls(**out)


def readers(cls: type) -> dict[str, tuple[Reader, bool]]:
    """Readers of a dataclass's fields, and whether each must be given. A reader takes a value and whether
    strangers are left out; it raises ValueError for what is not of the field's type.

    A bool is no number, and a whole number is a float. A type with a `from_dict` reads itself.
    """
    if (known := _READERS.get(cls)) is None:
        found = get_type_hints(cls)
        known = _READERS[cls] = {
            f.name: (_reader(found[f.name]), f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls)  # type: ignore[arg-type]
            if f.init
        }
    return known


_READERS: dict[type, dict[str, tuple[Reader, bool]]] = {}


def _reader(hint: Any) -> Reader:
    """The reader of a type, made once: what a type is made of takes longer to find out than to check."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value, strangers: value
    if origin in (Union, types.UnionType):
        inner = _reader(next(a for a in args if a is not type(None)))
        return lambda value, strangers: None if value is None else inner(value, strangers)
    if origin is list:
        return _list_reader(args[0])
    if origin is dict:
        return _dict_reader(args[1])
    if hasattr(hint, "from_dict"):
        return lambda value, strangers: hint.from_dict(value, strangers=strangers)
    if is_dataclass(hint):
        return lambda value, strangers: read(hint, value, strangers=strangers)  # type: ignore[type-var, arg-type]
    kinds = (float, int) if hint is float else (hint,)

    def plain(value: Any, strangers: bool) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"{_shown(value)} is no {hint.__name__}")
        return value

    return plain


def _list_reader(hint: Any) -> Reader:
    inner, plain = _reader(hint), {hint} if hint in (int, str) else None

    def items(value: Any, strangers: bool) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"{_shown(value)} is no list")
        if plain is None:
            return [inner(item, strangers) for item in value]
        if not plain.issuperset(map(type, value)):  # of token ids there are many
            raise ValueError(f"not every item is {hint.__name__}")
        return value

    return items


def _dict_reader(hint: Any) -> Reader:
    inner, anything = _reader(hint), hint is Any

    def values(value: Any, strangers: bool) -> Any:
        if not isinstance(value, dict) or not _TEXT.issuperset(map(type, value)):
            raise ValueError(f"{_shown(value)} is no object")
        return value if anything else {key: inner(item, strangers) for key, item in value.items()}

    return values


_TEXT = {str}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
