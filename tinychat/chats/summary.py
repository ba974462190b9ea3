"""A conversation made shorter: what its model is asked for, and what goes on from the summary.

The one place for the words of it. Loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinychat.conversation import Message

PROMPT = """\
Summarise our conversation so far, so that it can go on from your summary alone. Write in the language of \
the conversation. Keep what I want and what we decided; facts, names, numbers, file names and code that are \
still needed; what is done, and what is open. Leave out greetings and what was given up. Use short plain \
sentences or a list, {words} words at most. Write nothing but the summary."""
ASKED = "Summarise our conversation so far."  # as the conversation keeps it
PROMPT_TOKENS = 160  # that the prompt may have, with what a template writes around it
LONGEST, SHORTEST = 640, 96  # tokens of a summary


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
