"""/compact line by line: the chat goes on from a summary that its model writes, as a branch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from tinychat.chats import summary
from tinychat.cli.output import Printer, cancel_on_interrupt, show_events
from tinychat.conversation import Message, Tree

if TYPE_CHECKING:
    from tinychat.chats.keeper import Keeper


class Tokens:
    """Counts with a session's own tokenizer; a server's is not known."""

    def __init__(self, session: Any):
        self.tokenizer = getattr(session.model, "tokenizer", None)

    async def count(self, text: str) -> int | None:
        return None if self.tokenizer is None else len(self.tokenizer.encode(text))

    async def head(self, text: str, tokens: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(self.tokenizer.encode(text)[:tokens])


def compact(session: Any, keeper: Keeper) -> None:
    """Show the summary as it is written, and go on from it in a branch that begins with the chat itself. A
    summary that is stopped, has no text or is no shorter leaves the conversation as it was.
    """
    model, counter = session.model, Tokens(session)
    path = summary.answered(session.tree.messages())
    context = model.n_ctx or 0
    length, before = summary.length_for(context), session.count_tokens()
    eviction = getattr(model, "eviction", None)  # where a server decides nothing is known
    evicts = eviction is None or eviction(chat=True) is not None
    said, kept = asyncio.run(summary.split(path, context, length, evicts, counter))
    written = _written(session, said, path, length)
    shorter, what = asyncio.run(summary.outcome(written, kept, before, model.name, counter))
    at = None
    for m in shorter:
        m.parent = at
        at = session.tree.append(m)
    if shorter:
        keeper.keep(session)
        what += " The whole chat stays: /tree shows it."
    click.echo(what, err=True)


def _written(session: Any, said: list[Message], path: list[Message], length: int) -> Message:
    """The summary, asked of the session itself, so that what it has read is not read again; it is left as it
    was.
    """
    tree, params = session.tree, session.params
    *before, question = summary.asking(said, length)
    session.tree = Tree.of_path(before)
    session.params = session.PARAMS.made(summary.sampling(dict(vars(params)), path, length))
    try:
        with cancel_on_interrupt(session):
            show_events(session.send(question.content), Printer())
        return session.tree.messages()[-1]
    finally:
        session.tree, session.params = tree, params
