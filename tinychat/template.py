"""Chat templates: Jinja2 from a checkpoint, which is a stranger's code, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tinychat.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

# Stands in rendered text for the n-th special-token spelling found inside a message's content.
_OPEN, _CLOSE = "\ue0ff", "\ue0fe"
_GUARD = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
# What one rendering may take. A conversation of 4000 messages runs 140,000 to 730,000 lines.
MAX_LINES = 2_000_000
MAX_BYTES = 1 << 28
REASONING = ("enable_thinking", "thinking")  # what templates call the switch: Qwen3 and SmolLM3, Granite


class ChatTemplate:
    """A compiled template. Sandboxed and immutable: it sees the messages and can change nothing.

    What users write is never parsed as control tokens: where a message spells one (`<|im_end|>`), its
    characters are tokenized as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        from jinja2 import TemplateError

        self.source = source
        self.tokenizer = tokenizer
        self._settings: dict[str, Any] = {}
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._spellings = [*sorted((t.content for t in added if t.special), key=len, reverse=True), _OPEN]
        self._special = re.compile("|".join(map(re.escape, self._spellings)))
        try:
            self._template = _environment().from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as e:
            raise CheckpointError(
                f"The chat template does not compile: {_one_line(e)}.",
                "The checkpoint is damaged; pull it again.",
            ) from e

    def think(self, on: bool) -> None:
        """Whether the model reasons before it answers. Raises UsageError where the template has no switch."""
        named = [name for name in REASONING if re.search(rf"\b{name}\b", self.source)]
        if not named:
            raise UsageError(
                "The model's chat template has no switch for reasoning.", "Leave out --think and --no-think."
            )
        self._settings = dict.fromkeys(named, on)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt's text, with guards in place of control tokens that messages spell.

        Raises UsageError when the template refuses the messages, CheckpointError when it is broken or tries
        to reach what the sandbox forbids.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        given = {"tools": None, "documents": None, **self.tokenizer.special_tokens, **self._settings}
        given |= self.guard(extra)
        try:
            with _bounded():
                return self._template.render(
                    messages=self.guard(messages), add_generation_prompt=add_generation_prompt, **given
                )
        except _RefusedError as e:
            raise UsageError(
                f"The model's chat template refuses these messages: {_one_line(e)}.",
                "Most templates want user and assistant to alternate, after at most one system message.",
            ) from e
        except SecurityError as e:
            raise CheckpointError(
                f"The chat template tried something that the sandbox forbids: {_one_line(e)}.",
                "Do not trust this checkpoint.",
            ) from e
        except (_EndlessError, RecursionError, MemoryError) as e:
            raise CheckpointError(
                "The chat template computes without end.", "Do not trust this checkpoint."
            ) from e
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            raise CheckpointError(
                f"The chat template failed: {type(e).__name__}: {_one_line(e)}.",
                "The checkpoint may be damaged; pull it again.",
            ) from e

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text: the template's control tokens as such, guarded ones as plain text."""
        ids: list[int] = []
        at = 0
        for match in _GUARD.finditer(text):
            ids += self.tokenizer.encode(text[at : match.start()], special=True)
            ids += self.tokenizer.encode(self._spellings[int(match[1])])
            at = match.end()
        return ids + self.tokenizer.encode(text[at:], special=True)

    def guard(self, value: Any) -> Any:
        """`value` with every spelling of a control token replaced, in all its strings however deep."""
        if isinstance(value, str):
            return self._special.sub(lambda m: f"{_OPEN}{self._spellings.index(m[0])}{_CLOSE}", value)
        if isinstance(value, dict):
            return {self.guard(k): self.guard(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guard(v) for v in value]
        return value


class _RefusedError(Exception):
    """A template called raise_exception."""


class _EndlessError(Exception):
    """A template ran for too long or made something too large."""


def _environment():
    """Jinja2 as transformers sets it up for chat templates, with limits."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))  # one step of these can take forever

        def call_binop(self, context, operator, left, right):
            size = 1
            for x in (left, right):
                size *= len(x) if isinstance(x, (str, list, tuple)) else abs(x)
            if (operator == "*" and size > MAX_BYTES) or (operator == "**" and abs(right) > 64):
                raise _EndlessError
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}`: marks what a model said, for training; here it is just its content."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise _RefusedError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    return environment


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200].rstrip(".")


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises _EndlessError once this thread has run too many lines of Python inside, or memory has grown too
    much.
    """
    lines, unit = 0, 1 if sys.platform == "darwin" else 1024

    def peak() -> int:  # asked often: machine.peak_rss reads a file
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    limit = peak() + MAX_BYTES

    def trace(_frame, _event, _arg):
        nonlocal lines
        lines += 1
        if lines > MAX_LINES or (lines % 8 == 0 and peak() > limit):
            raise _EndlessError
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
