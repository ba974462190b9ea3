"""`tinychat chats`: what was said before."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tinychat.characters import is_unicode, whole
from tinychat.cli import tables
from tinychat.cli.chat import Printer

if TYPE_CHECKING:
    from tinychat.store import ChatStore


@click.command()
@click.argument("words", nargs=-1, metavar="[SEARCH | export ID | rm ID...]")
@click.option("--json", "as_json", is_flag=True)
def chats(words: tuple[str, ...], as_json: bool) -> None:
    """Chats on this machine, newest first: `tinychat run --resume ID` goes on with one.

    \b
    tinychat chats glacier        those in which it was said
    tinychat chats export 3       print chat 3 as Markdown (--json: for Session.load)
    tinychat chats rm 3 5         delete chats
    """
    from tinychat.export import to_json, to_markdown
    from tinychat.store import ChatStore

    numbers = [int(w) for w in words[1:] if w.isdecimal() and len(w) <= 18]
    is_ids = bool(numbers) and len(numbers) == len(words) - 1
    store = ChatStore()
    store.purge()
    if words[:1] == ("rm",) and is_ids:
        _remove(store, numbers, as_json)
    elif words[:1] == ("export",) and is_ids and len(numbers) == 1:
        out = Printer()
        if as_json:
            out.write(to_json(store, numbers[0], ensure_ascii=not is_unicode(sys.stdout)))
        else:
            out.write(to_markdown(store, numbers[0]))
        out.end()
    elif len(words) == 1 and words[0] in ("rm", "export"):
        raise click.UsageError(f"Which chat? tinychat chats {words[0]} ID; tinychat chats lists them.")
    else:
        _show(store, whole(" ".join(words)), as_json)


def _remove(store: ChatStore, ids: list[int], as_json: bool) -> None:
    found = [store.chat(i) for i in ids]  # all of them, or none
    for chat in found:
        store.lock(chat.id)()  # not while it is open somewhere
    for chat in found:
        store.delete(chat.id)
        if not as_json:
            click.echo(f"Deleted “{chat.title}”; it is wiped after a week.", err=True)
    if as_json:
        Printer().line(json.dumps({"deleted": ids}))


def _show(store: ChatStore, search: str, as_json: bool) -> None:
    from tinychat.store import MARK, UNMARK

    out = Printer()
    hits = store.search(search)
    if as_json:
        rows = [{**asdict(h.chat), "excerpt": h.excerpt.replace(MARK, "").replace(UNMARK, "")} for h in hits]
        out.json(rows, indent=2)
        return
    if not hits:
        click.echo("Nothing found." if search else "No chats yet. tinychat run starts one.", err=True)
        return
    tables.show(
        (
            f"{h.chat.id:>5}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(h.chat.updated)),
            f"{h.chat.title}  ({h.chat.messages} messages, {h.chat.model})",
        )
        for h in hits
    )


commands = [chats]
