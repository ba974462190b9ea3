"""What comes from a file or another process, checked against the dataclass that it should be.

Types are read from the annotations: adding a field to a dataclass is enough. Loads nothing heavy.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read(cls: type[T], given: Any, *, strangers: bool = False) -> T:
    """An instance of a dataclass from a mapping of its fields; those with a default may be missing.

    strangers: fields that it does not have are left out, as a newer program may send them. Raises ValueError
    that names the field for whatever is missing, unknown or of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"no {cls.__name__}")
    known = hints(cls)
    if not strangers and (unknown := [str(name) for name in given if name not in known]):
        raise ValueError(f"unknown field {unknown[0][:50]}")
    out = {}
    for name, (hint, needed) in known.items():
        if name in given:
            try:
                out[name] = converted(given[name], hint, strangers)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
        elif needed:
            raise ValueError(f"{name} is missing")
    return cls(**out)


def hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Type of each field of a dataclass, and whether it must be given."""
    if (known := _HINTS.get(cls)) is not None:
        return known
    found = get_type_hints(cls)
    _HINTS[cls] = {
        f.name: (found[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)  # type: ignore[arg-type]
        if f.init
    }
    return _HINTS[cls]


_HINTS: dict[type, dict[str, tuple[Any, bool]]] = {}


def converted(value: Any, hint: Any, strangers: bool = False) -> Any:
    """The value as that type has it: a mapping becomes a dataclass. Raises ValueError if it is none of it.

    A bool is no number, and a whole number is a float. A type with a `from_dict` reads itself.
    """
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return converted(value, next(a for a in args if a is not type(None)), strangers)
    if origin is Literal:
        if not (isinstance(value, str) and value in args):
            raise ValueError(f"{_shown(value)} is not one of {', '.join(args)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{_shown(value)} is no list")
        if args[0] in (int, str):  # of token ids there are many
            if not all(type(item) is args[0] for item in value):
                raise ValueError(f"not every item is {args[0].__name__}")
            return value
        return [converted(item, args[0], strangers) for item in value]
    if origin is dict:
        if not isinstance(value, dict) or not all(type(key) is str for key in value):
            raise ValueError(f"{_shown(value)} is no object")
        return {key: converted(item, args[1], strangers) for key, item in value.items()}
    if hasattr(hint, "from_dict"):
        return hint.from_dict(value, strangers=strangers)
    if is_dataclass(hint):
        return read(hint, value, strangers=strangers)  # type: ignore[type-var, arg-type]
    if not (type(value) is hint or (hint is float and type(value) is int)):
        raise ValueError(f"{_shown(value)} is no {hint.__name__}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
