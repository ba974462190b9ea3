"""docs/reference.md, from the docstrings and types of what Python programs use.

python docs/make/reference.py     writes it
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tinychat
from tinychat import keywords
from tinychat.conversation import Message, Tree
from tinychat.text.tokenizer import Tokenizer
from tinychat.tool_loop import ToolRun

PAGE = "docs/reference.md"
WIDTH = 100  # of a signature
FENCE = "```"
Property = property | cached_property
EVENTS = ["TextDelta", "ToolCallDelta", "Notice", "Reading", "Done", "Completion", "ToolCall", "Stats"]
KEYWORDS = ["SamplingKeywords", "PromptKeywords", "ChatKeywords", "SessionKeywords", "LoadKeywords"]
ERRORS = [n for n in tinychat.__all__ if n.endswith("Error")]
# What programs are given and do not make: how it is made is no part of the page.
GIVEN = ("Model", "Aside", "Tokenizer", "Tree", "ToolRun", "SamplingParams", "LoadOptions")
# What is public for other parts of the package alone.
INSIDE = {
    "Model": {"continuing", "eviction", "needs_bos", "speculator"},
    "Session": {"load_kv", "read_saved", "save_kv"},
    "Message": {"as_dict", "for_model", "forget_ids", "from_dict", "mended"},
    "Tree": {"append", "as_dict", "from_dict", "of_path", "switch"},
    "TextDelta": {"kept", "tokens"},
    "SamplingParams": {"may_raise", "penalizes", "without_penalties"},
    "LoadOptions": {"inherited"},
    "Tokenizer": {"first_piece", "normalized_markers", "piece", "text_bytes", "to_json"},
}
# Title, a sentence, and the names of the package or the objects that programs are given by others.
PARTS: list[tuple[str, str, list[Any]]] = [
    ("Loading", "", ["load", "LoadOptions"]),
    ("Models", "", ["Model", Tokenizer]),
    ("Conversations", "", ["Session", Message, Tree]),
    (
        "Answers",
        "`Event` is one of `TextDelta`, `ToolCallDelta`, `Notice`, `Reading` and `Done`; each has a `text`.",
        EVENTS,
    ),
    ("Event loops", "What `asend`, `achat(…, stream=True)` and the like give.", ["Aside"]),
    ("Tools", "", ["run_tools", "arun_tools", ToolRun]),
    ("Sampling", "", ["SamplingParams"]),
    (
        "Keywords",
        "Types of what is given by keyword: `def ask(question: str, **sampling: Unpack[SamplingKeywords])`. "
        "None leaves it as the model or the session has it.",
        KEYWORDS,
    ),
    ("Errors", "", ERRORS),
]


def page() -> str:
    """The whole page."""
    parts = [(title, words, [_object(name) for name in names]) for title, words, names in PARTS]
    table = [f"| {title} | {', '.join(map(_link, objects))} |" for title, _, objects in parts]
    lines = [
        "# Python reference",
        "",
        "Made from the docstrings by `python docs/make/reference.py`; a test holds that it is up to date.",
        "Names are those of `tinychat`, or of what its functions return. How to begin:",
        "[README](../README.md#from-python).",
        "",
        "| part | names |",
        "|---|---|",
        *table,
    ]
    for title, words, objects in parts:
        lines += ["", f"## {title}", *(["", words] if words else [])]
        for thing in objects:
            lines += _entry(thing)
    return "\n".join(lines) + "\n"


def _object(name: Any) -> Any:
    return getattr(tinychat, name) if isinstance(name, str) else name


def _link(thing: Any) -> str:
    return f"[{thing.__name__}](#{thing.__name__.lower()})"


def _entry(thing: Any) -> Iterator[str]:
    """A function, or a class with what is public of it."""
    yield from ("", f"### {thing.__name__}")
    if thing.__name__ in KEYWORDS:
        yield from ("", *_words(thing), "", *_keywords(thing))
        return
    if not inspect.isclass(thing):
        yield from ("", *_code(_signature(thing.__name__, thing)), "", *_words(thing))
        return
    if not issubclass(thing, BaseException) and thing.__name__ not in GIVEN:
        yield from ("", *_code(_signature(thing.__name__, thing)))
    yield from ("", *_words(thing))
    for name, member in _members(thing):
        if name in INSIDE.get(thing.__name__, ()):
            continue
        yield from ("", f"#### {thing.__name__}.{name}", "")
        if isinstance(member, Property):
            getter = member.fget if isinstance(member, property) else member.func
            yield from _code(f"{name}: {inspect.signature(getter).return_annotation}")
        else:
            yield from _code(_signature(name, member))
        yield from ("", *_words(member))


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with docstrings, those of the bases first, each where it is new."""
    seen: set[str] = set()
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("tinychat.") or base.__name__ == "Settings":
            continue
        for name, member in vars(base).items():
            member = getattr(cls, name) if isinstance(member, classmethod | staticmethod) else member
            known = isinstance(member, Property) or inspect.isroutine(member)
            if known and not name.startswith("_") and name not in seen and inspect.getdoc(member):
                seen.add(name)
                yield name, getattr(cls, name)  # as it is in the end: a class may have its own


def _signature(name: str, function: Any) -> str:
    """A function as one would write it, `self` left out."""
    found = inspect.signature(function)
    given, starred = [], False
    for p in found.parameters.values():
        if p.name == "self":
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            given.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        typed = "" if p.annotation is p.empty else f": {p.annotation}"
        default = "" if p.default is p.empty else f" = {_default(function, p)}"
        given.append(f"{stars}{p.name}{typed}{default}")
    returned = found.return_annotation
    after = "" if returned is found.empty or inspect.isclass(function) else f" -> {returned}"
    line = f"{name}({', '.join(given)}){after}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {g}," for g in given), f"){after}"])
    return _quoted(line)


def _quoted(code: str) -> str:
    """Code with the quotes that the house has."""
    return code.replace("'", '"')


def _default(function: Any, parameter: inspect.Parameter) -> str:
    if inspect.isfunction(parameter.default):
        return "…"
    if dataclasses.is_dataclass(function):
        field = function.__dataclass_fields__[parameter.name]
        if field.default_factory is not dataclasses.MISSING:
            return repr(field.default_factory())
    return repr(parameter.default)


def _keywords(thing: Any) -> Iterator[str]:
    """The keywords of a type that none before it has."""
    before = [getattr(keywords, n) for n in KEYWORDS[: KEYWORDS.index(thing.__name__)]]
    known = [t for t in before if set(t.__annotations__) < set(thing.__annotations__)]
    base = max(known, key=lambda t: len(t.__annotations__), default=None)
    if base is not None:
        yield from (f"Those of {_link(base)}, and:", "")
    new = [k for k in thing.__annotations__ if base is None or k not in base.__annotations__]
    types = {k: getattr(t, "__forward_arg__", t) for k, t in thing.__annotations__.items()}
    yield from _code(_quoted("\n".join(f"{k}: {types[k]}" for k in new)))


def _code(text: str) -> list[str]:
    return [f"{FENCE}python", *text.split("\n"), FENCE]


def _words(thing: Any) -> Iterator[str]:
    """A docstring as Markdown: what is laid out in columns or is a program stays as it is."""
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    for i, block in enumerate(re.split(r"\n\s*\n", text)):
        if i:
            yield ""
        if re.match(r" {4}", block):
            yield from _code(inspect.cleandoc(block))
        elif re.search(r"^\S+ {2,}\S", block, re.MULTILINE):
            yield from (f"{FENCE}text", *block.split("\n"), FENCE)
        else:
            yield from block.split("\n")


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / PAGE).write_text(page(), encoding="utf-8")
