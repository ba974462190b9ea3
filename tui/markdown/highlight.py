"""Code in colours: Pygments' tokens as spans."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tinychat.tui.text import Line, Span

LONGEST = 12288  # characters of code that are still coloured
LONGEST_LINE = 1000
_TOKEN_STYLES = (
    ("Comment", "tok-comment"),
    ("Keyword", "tok-keyword"),
    ("Literal.String", "tok-string"),
    ("Literal.Number", "tok-number"),
    ("Name.Function", "tok-function"),
    ("Name.Class", "tok-function"),
    ("Name.Decorator", "tok-function"),
    ("Name.Builtin", "tok-builtin"),
    ("Name.Tag", "tok-keyword"),
    ("Name.Attribute", "tok-builtin"),
    ("Operator.Word", "tok-keyword"),
    ("Generic.Inserted", "tok-string"),
    ("Generic.Deleted", "tok-number"),
    ("Generic.Heading", "tok-function"),
)


@lru_cache(512)
def _token_style(kind: Any) -> str:
    name = str(kind).removeprefix("Token.")
    return next(
        (f"codeblock {style}" for prefix, style in _TOKEN_STYLES if name.startswith(prefix)), "codeblock"
    )


@lru_cache(32)
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def highlight(text: str, language: str) -> list[Line]:
    """Code as styled lines, tabs expanded."""
    text = text.removesuffix("\n").expandtabs(4)
    lexer = _lexer(language.lower()) if language and len(text) <= LONGEST else None
    if lexer is None or max(map(len, text.split("\n"))) > LONGEST_LINE:
        return [[(line, "codeblock")] for line in text.split("\n")]
    lines: list[Line] = [[]]
    for style, value in _tokens(lexer, text):
        parts = value.split("\n")
        for i, part in enumerate(parts):
            if i:
                lines.append([])
            if part:
                lines[-1].append((part, style))
    return lines


def _tokens(lexer: Any, text: str) -> Iterator[Span]:
    for kind, value in lexer.get_tokens(text):
        yield _token_style(kind), value
