"""Chat templates: Jinja2 from a checkpoint, which is a stranger's code, rendered elsewhere (`rendering`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tinychat import rendering
from tinychat.errors import UsageError

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

# Stands in rendered text for the n-th special-token spelling found inside a message's content.
_OPEN, _CLOSE = "\ue0ff", "\ue0fe"
_GUARD = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
REASONING = ("enable_thinking", "thinking")  # what templates call the switch: Qwen3 and SmolLM3, Granite


class ChatTemplate:
    """A template that compiles. It sees the messages and can change nothing.

    What users write is never parsed as control tokens: where a message spells one (`<|im_end|>`), its
    characters are tokenized as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = tokenizer
        self._settings: dict[str, Any] = {}
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._spellings = [*sorted((t.content for t in added if t.special), key=len, reverse=True), _OPEN]
        self._special = re.compile("|".join(map(re.escape, self._spellings)))
        rendering.check(source)

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

        Raises UsageError when the template refuses the messages, CheckpointError when it is broken, computes
        without end or tries to reach what the sandbox forbids.
        """
        given = {"tools": None, "documents": None, **self.tokenizer.special_tokens, **self._settings}
        given |= self.guard(extra)
        given["messages"], given["add_generation_prompt"] = self.guard(messages), add_generation_prompt
        return rendering.render(self.source, given)

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
