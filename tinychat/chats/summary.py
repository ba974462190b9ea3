"""A conversation made shorter: what its model is asked for, and what goes on from the summary.

The one place for its words and for what is decided, for the screen and line by line. Loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from tinychat.base.errors import UsageError
from tinychat.conversation import Message

PROMPT = """\
Summarise our conversation so far, so that it can go on from your summary alone. Write in the language of \
the conversation. Keep what I want and what we decided; facts, names, numbers, file names and code that are \
still needed; what is done, and what is open. Leave out greetings and what was given up. Use short plain \
sentences or a list, {words} words at most. Write nothing but the summary."""
ASKED = "Summarise our conversation so far."  # as the conversation keeps it
PROMPT_TOKENS = 160  # that the prompt may have, with what a template writes around it
LONGEST, SHORTEST = 640, 96  # tokens of a summary
TEMPLATE = 6  # tokens that a template writes around a message, about
KEPT = 6  # the last question and its answer stay as they are where they take that part of the context or less


class Counter(Protocol):
    """What knows the model's tokens; None where nobody does."""

    async def count(self, text: str) -> int | None:
        """Tokens of a text."""

    async def head(self, text: str, tokens: int) -> str | None:
        """The beginning of a text that takes so many tokens."""


def answered(path: Sequence[Message]) -> list[Message]:
    """The conversation up to its last answer. Raises UsageError where there is nothing to make shorter."""
    path = list(path)
    while path and path[-1].role != "assistant":
        path.pop()  # it never got an answer
    if not path or is_summary(path):
        raise UsageError("There is nothing to make shorter yet.", "Say something first.")
    return path


async def split(
    path: Sequence[Message], context: int, length: int, evicts: bool, counter: Counter
) -> tuple[list[Message], list[Message]]:
    """What is summarised in so many tokens, and what stays as it is: the last exchange where it is short;
    more where the context has no room for the rest, the question and the summary, and nothing would make way.
    """
    path = list(path)
    at = max((i for i, m in enumerate(path) if m.role == "user"), default=0)
    if at == 0 or await _tokens_of(path[at:], counter) > (context or 4096) // KEPT:
        at = len(path)
    if not context or evicts:
        return path[:at], path[at:]
    room = context - PROMPT_TOKENS - length
    while at and _used(path[:at]) > room:
        at = max((i for i, m in enumerate(path[:at]) if m.role == "user"), default=0)
    kept = path[at:]
    if at and await _tokens_of(kept, counter) <= context // 4:
        return path[:at], kept
    return await _shortened(path, room, counter), []


def sampling(given: dict[str, Any], path: Sequence[Message], length: int) -> dict[str, Any]:
    """How a summary of so many tokens is sampled: as the chat is, with room for a thought if it had some."""
    if any(m.stats.get("reasoning_tokens") for m in path):
        return {**given, "max_tokens": 2 * length, "think_budget": length}
    return {**given, "max_tokens": length}


async def outcome(
    answer: Message, kept: Sequence[Message], before: int, model: str, counter: Counter
) -> tuple[list[Message], str]:
    """The messages of the shorter conversation (none where there is none), and what to say of it.

    answer: what the model wrote. before: tokens of the conversation as it was.
    """
    text = answer.split()[1].strip()
    if answer.finish_reason not in ("stop", "length") or not text:
        why = "has no text" if answer.finish_reason in ("stop", "length") else "was stopped"
        return [], f"The summary {why}: the chat is as it was."
    if answer.finish_reason == "length":
        text += " …"
    after = await _tokens_in("\n".join([ASKED, text, *(k.as_read() for k in kept)]), counter)
    after += TEMPLATE * (2 + len(kept))
    if after >= before:
        return [], f"The summary is no shorter ({after:,} tokens): the chat is as it was."
    return going_on(text, model, kept, after), f"Compacted: {before:,} tokens are {after:,} now."


def length_for(context: int) -> int:
    """Tokens that a summary may have; context: those that the model can read, 0 where that is not known."""
    return max(SHORTEST, min(LONGEST, context // 6)) if context else LONGEST


def asking(path: Sequence[Message], length: int) -> list[Message]:
    """The conversation with the question for a summary of that many tokens behind it."""
    return [*path, Message("user", PROMPT.format(words=length // 2))]


def is_summary(path: Sequence[Message]) -> bool:
    """Whether a conversation is nothing but a summary."""
    return len(path) == 2 and path[0].content == ASKED


def going_on(summary: str, model: str, kept: Sequence[Message], after: int) -> list[Message]:
    """The messages of the shorter conversation: the summary, and the last ones as they were said.

    after: tokens that they take together.
    """
    said = [Message("user", ASKED), Message("assistant", summary, finish_reason="stop", model=model)]
    said += [replace(m, parent=None, stats={}) for m in kept]
    said[-1].stats = {"prompt_tokens": after}
    return said


async def _shortened(path: list[Message], room: int, counter: Counter) -> list[Message]:
    """The conversation with its longest message cut, so that it fits."""
    longest = max(path, key=lambda m: len(m.as_read()))
    tokens = await _tokens_of([longest], counter)
    left = max(16, tokens - max(0, await _tokens_of(path, counter) + 8 * len(path) - room))
    text = await counter.head(longest.as_read(), left) or longest.as_read()[: 3 * left]
    cut = replace(longest, content=f"{text}\n[…]", attachments=[])
    cut.forget_ids()
    return [cut if m is longest else m for m in path]


async def _tokens_in(text: str, counter: Counter) -> int:
    counted = await counter.count(text)
    return len(text) // 3 if counted is None else counted


async def _tokens_of(messages: Sequence[Message], counter: Counter) -> int:
    return await _tokens_in("\n".join(m.as_read() for m in messages), counter)


def _used(path: Sequence[Message]) -> int:
    """Tokens that a conversation took when it was last answered."""
    for m in reversed(path):
        if n := m.stats.get("prompt_tokens"):
            return n + m.stats.get("generated_tokens", 0)
    return 0
