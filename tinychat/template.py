"""Chat templates: Jinja2 from a checkpoint, which is a stranger's code, rendered elsewhere (`rendering`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tinychat import rendering
from tinychat.errors import UsageError
from tinychat.markers import Markers, reveal

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

REASONING = ("enable_thinking", "thinking")  # what templates call the switch: Qwen3 and SmolLM3, Granite


class ChatTemplate:
    """A template that compiles. It sees the messages and can change nothing.

    What users write is never parsed as markers of turns: where a message spells one (`<|im_end|>`), its
    characters are tokenized as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = tokenizer
        self._settings: dict[str, Any] = {}
        self.markers = Markers(tokenizer, source)
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
        """The prompt's text, with guards in place of markers that messages spell (`markers.reveal`).

        Raises UsageError when the template refuses the messages, CheckpointError when it is broken, computes
        without end or tries to reach what the sandbox forbids.
        """
        given = {"tools": None, "documents": None, **self.tokenizer.special_tokens, **self._settings}
        given |= self.guard(extra)
        given["messages"], given["add_generation_prompt"] = self.guard(messages), add_generation_prompt
        return rendering.render(self.source, given)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Token ids of rendered text: the template's markers as such, guarded ones as plain text.

        after: as for `Tokenizer.encode`.
        """
        text, plain = reveal(text)
        return self.tokenizer.encode(text, special=True, after=after, plain=plain)

    def guard(self, value: Any, spoken: bool = False) -> Any:
        """`value` as templates see it; spoken: it is an answer (`Markers.guard`)."""
        return self.markers.guard(value, spoken)
