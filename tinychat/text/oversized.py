"""Refusing a text that is far too long before all of it is tokenized, which takes 160 times its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinychat.base.errors import UsageError

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer

SMALL = 1 << 17  # characters that are tokenized without a look at how many there are
PIECE = 1 << 16  # characters that are tokenized at a time
SLACK = 64  # tokens that a cut between two pieces may add, generously
CONTEXTS = (
    16  # contexts that a conversation which gives tokens up may be told at once; it reads them for hours
)


def refuse_oversized(tokenizer: Tokenizer, texts: Sequence[str], n_ctx: int, evicts: bool = False) -> None:
    """Raise UsageError for texts that together have more tokens than the context can take.

    evicts: the conversation outgrows its context by giving tokens up.
    """
    n = sum(map(len, texts))
    most = n_ctx * (CONTEXTS if evicts else 1)
    if n <= SMALL or n <= most:  # a token has a character, or nearly
        return
    found = 0
    for text in texts:
        for at in range(0, len(text), PIECE):
            found += max(0, len(tokenizer.encode(text[at : at + PIECE])) - SLACK)
            if found > most:
                raise UsageError(
                    f"The text has {n:,} characters, more than {most:,} tokens; the context holds {n_ctx:,}.",
                    "Give a part of it.",
                )
