"""Chat templates: Jinja2 from a checkpoint, which is a stranger's code, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any

from tinychat.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

# Stands in rendered text for the n-th special-token spelling found inside a message's content.
_GUARD = re.compile("\ue0ff([0-9]+)\ue0fe")


class ChatTemplate:
    """A compiled template. Sandboxed and immutable: it sees the messages and can change nothing.

    What users write is never parsed as control tokens: where a message spells one (`<|im_end|>`), its
    characters are tokenized as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._spellings = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._spellings))) if self._spellings else None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda x, **kw: json.dumps(
            x, ensure_ascii=False, indent=kw.get("indent")
        )
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        try:
            self._template = environment.from_string(source)
        except TemplateError as e:
            raise CheckpointError(
                f"The chat template does not compile: {_one_line(e)}.",
                "The checkpoint is damaged; pull it again.",
            ) from e

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt's text, with guards in place of control tokens that messages spell.

        Raises UsageError when the template refuses the messages, CheckpointError when it is broken or tries
        to reach what the sandbox forbids.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        guarded = [{k: self.guard(v) for k, v in m.items()} for m in messages]
        try:
            return self._template.render(
                messages=guarded,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens, **extra},
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
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            raise CheckpointError(
                f"The chat template failed: {type(e).__name__}: {_one_line(e)}.",
                "The checkpoint may be damaged; pull it again.",
            ) from e
        except RecursionError as e:
            raise CheckpointError(
                "The chat template recurses without end.", "Do not trust this checkpoint."
            ) from e

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text: the template's control tokens as such, guarded ones as plain text."""
        ids: list[int] = []
        at = 0
        for match in _GUARD.finditer(text):
            ids += self.tokenizer.encode(text[at : match.start()], special=True)
            index = int(match[1])
            ids += self.tokenizer.encode(self._spellings[index] if index < len(self._spellings) else match[0])
            at = match.end()
        return ids + self.tokenizer.encode(text[at:], special=True)

    def guard(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        value = _GUARD.sub("", value)  # a message cannot bring guards of its own
        if self._special is None:
            return value
        return self._special.sub(lambda m: f"\ue0ff{self._spellings.index(m[0])}\ue0fe", value)

    @staticmethod
    def _raise(message: str) -> None:
        raise _RefusedError(message)


class _RefusedError(Exception):
    """A template called raise_exception."""


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200].rstrip(".")
