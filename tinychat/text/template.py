"""Chat templates: Jinja2 from a checkpoint, which is a stranger's code, rendered elsewhere (`rendering`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tinychat.base import arguments
from tinychat.base.errors import TinychatError, UsageError
from tinychat.text import rendering
from tinychat.text.chat_templates import DEFAULT, TOOLS
from tinychat.text.markers import Markers, reveal
from tinychat.text.reasoning import (
    CHANNEL,
    END,
    MESSAGE,
    START,
    Splitter,
    opens,
    pieces_of,
    split_thought,
    tags_in,
)
from tinychat.text.tool_template import ToolTemplate

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer

SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch: Qwen3 and SmolLM3, Granite
EFFORT, EFFORTS = "reasoning_effort", ("none", "minimal", "low", "medium", "high", "xhigh", "max")
REASONING = ("reasoning_content", "thinking", "reasoning")  # what messages call it; the first has precedence
LONGEST_CLOSING = 200


class ChatTemplate:
    """A template that compiles, and the one for conversations with tools where there is one. It sees the
    messages and can change nothing.

    What users write is never parsed as markers of turns: where a message spells one (`<|im_end|>`), its
    characters are tokenized as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = tokenizer
        self._settings: dict[str, Any] = {}
        named = {**tokenizer.chat_templates, DEFAULT: source}
        self.sources = {name: named[name] for name in (DEFAULT, TOOLS) if name in named}
        for text in self.sources.values():
            rendering.check(text)
        self._tags = tags_in(set(tokenizer.markers.values()))
        self.markers = Markers(tokenizer, "\n".join(self.sources.values()))

    def think(self, on: bool) -> None:
        """Whether the model reasons before it answers. Raises UsageError where the template has no switch."""
        self._settings |= self.switches(think=on)

    def effort(self, level: str) -> None:
        """How much the model reasons first. Raises UsageError where the template has no levels."""
        self._settings |= self.switches(effort=level)

    def switches(self, think: bool | None = None, effort: str | None = None) -> dict[str, Any]:
        """What `render` has to be given for that; nothing where they are None. Raises UsageError where the
        template does not know it.
        """
        found: dict[str, Any] = {}
        if think is not None:
            arguments.flag("think", think)
            named = [name for name in SWITCHES if re.search(rf"\b{name}\b", self.source)]
            if not named:
                raise UsageError(
                    "The model's chat template has no switch for reasoning.",
                    "Leave out --think and --no-think.",
                )
            found |= dict.fromkeys(named, think)
        if effort is not None:
            arguments.choice("effort", effort, EFFORTS, f"Use one of {', '.join(EFFORTS)}.")
            if not re.search(rf"\b{EFFORT}\b", self.source):
                raise UsageError(
                    "The model's chat template has no levels of effort.",
                    "Leave it out; --think-budget bounds what any model thinks.",
                )
            found[EFFORT] = effort
        return found

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt's text, with guards in place of markers that messages spell (`markers.reveal`).

        Raises UsageError when the template refuses the messages, CheckpointError when it is broken, computes
        without end or tries to reach what the sandbox forbids.
        """
        given = {"tools": None, "documents": None, **self.tokenizer.special_tokens, **self._settings}
        try:
            given |= self.guard(extra)
            given["messages"] = [_plain(m) for m in self.guard(messages)]
        except RecursionError as e:  # JSON goes deeper in some versions of Python
            raise UsageError(
                "A message holds lists and dicts that are too deep in each other.", "Use fewer levels."
            ) from e
        given["add_generation_prompt"] = add_generation_prompt
        source = self.source if given["tools"] is None else self.sources.get(TOOLS, self.source)
        return rendering.render(source, given)

    @functools.cached_property
    def tools(self) -> ToolTemplate:
        """The template for conversations with tools."""
        return ToolTemplate(self)

    def splitter(self, text: str) -> Splitter:
        """Tells reasoning from the answer in what a model writes behind rendered text."""
        return Splitter(text, self.source, self._tags)

    @functools.cached_property
    def openers(self) -> frozenset[int]:
        """The tokens with which a model of this template may begin a thought of its own accord."""
        known = "\n".join(self.sources.values())
        markers = self.tokenizer.markers.items()
        return frozenset(i for i, text in markers if text in known and opens(text, self._tags))

    @property
    def thinks(self) -> bool:
        """Whether a model of this template may think of its own accord."""
        phrases = (t.start for t in self._tags if t.phrase)
        return bool(self.openers) or any(start in self.source for start in phrases)

    def closing(self, end: str) -> str:
        """What stands between a thought, which `end` ends, and the answer; "": where channels do."""
        written = self._between
        if end:
            return written if end in written else f"\n{end}\n\n"
        return written if written.startswith(END) else f"{END}{START}assistant{CHANNEL}final{MESSAGE}"

    @functools.cached_property
    def _between(self) -> str:
        """What the template itself writes between a thought and the answer; "": it leaves thoughts out."""
        thought, answer = "Thinking aloud.", "Answering."
        message = {"role": "assistant", "content": answer, **dict.fromkeys(REASONING, thought)}
        try:
            text = self.render([{"role": "user", "content": "?"}, message], False)
        except TinychatError:  # some want more than that of a conversation
            return ""
        at = text.find(thought)
        end = text.find(answer, at) if at >= 0 else -1
        found = text[at + len(thought) : end] if end >= 0 else ""
        return found if len(found) <= LONGEST_CLOSING else ""

    def answer(self, written: str, prompt: str) -> dict[str, Any]:
        """The message of what a model wrote behind `prompt`, for rendering: with its reasoning apart where
        the template reads that, else in one piece, which many templates take apart themselves.
        """
        reasoning, text, _ = split_thought(written, prompt)
        if reasoning is None or not self._reads_reasoning:
            return {"role": "assistant", "content": written}
        return {"role": "assistant", "content": text, **dict.fromkeys(REASONING, reasoning)}

    @functools.cached_property
    def _reads_reasoning(self) -> bool:
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        try:
            plain, told = (
                self.render([question, {**answer, **more}], False)
                for more in ({}, dict.fromkeys(REASONING, "#"))
            )
        except TinychatError:  # some want more than that of a conversation
            return False
        return plain != told

    def renderings(self, written: str, prompt: str) -> Iterator[str]:
        """How what a model wrote behind `prompt` may stand in rendered text: as a message spelled it, or with
        the markers of reasoning written by the template.
        """
        yield self.guard(written, spoken=True)
        pieces = pieces_of(written, prompt)
        yield "".join(p.written if p.kind == "marker" else self.guard(p.written, spoken=True) for p in pieces)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Token ids of rendered text: the template's markers as such, guarded ones as plain text.

        after: as for `Tokenizer.encode`.
        """
        text, plain = reveal(text)
        return self.tokenizer.encode(text, special=True, after=after, plain=plain)

    def guard(self, value: Any, spoken: bool = False) -> Any:
        """`value` as templates see it; spoken: it is an answer (`Markers.guard`)."""
        return self.markers.guard(value, spoken)


def _plain(message: Any) -> Any:
    """A message as transformers gives it to templates: without what is None, and with its reasoning under the
    names that they read.
    """
    if not isinstance(message, dict):
        return message
    message = {k: v for k, v in message.items() if v is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
