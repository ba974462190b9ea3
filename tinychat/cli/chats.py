"""`tinychat chats`: what was said before."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from tinychat.base import terminal
from tinychat.base.characters import is_unicode, whole
from tinychat.base.errors import TinychatError
from tinychat.cli import tables
from tinychat.cli.options import complete_chats
from tinychat.cli.output import Printer

if TYPE_CHECKING:
    from tinychat.chats.chat_store import ChatStore, Hit

ACTIONS = ("export", "rm", "restore")
MOST, ALL = 50, 1_000_000  # chats that are listed
INDENT = 7  # cells before an excerpt, which stands under the date


def complete_words(ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
    """Shell completion of an action, and of the chats that it is for."""
    before = tuple(ctx.params.get("words") or ())
    if not before:
        return [CompletionItem(a) for a in ACTIONS if a.startswith(incomplete)]
    return complete_chats(ctx, None, incomplete) if before[0] in ("export", "rm") else []


@click.command()
@click.argument(
    "words",
    nargs=-1,
    metavar="[SEARCH | export ID | rm ID... | restore ID...]",
    shell_complete=complete_words,
)
@click.option("--deleted", is_flag=True, help="What was deleted within the last week.")
@click.option("--all", "everything", is_flag=True, help=f"More than the newest {MOST}.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of lines.")
def chats(words: tuple[str, ...], deleted: bool, everything: bool, as_json: bool) -> None:
    """Chats on this machine, newest first: `tinychat run --resume ID` goes on with one.

    \b
    tinychat chats glacier        those in which it was said, and where
    tinychat chats export 3       print chat 3 as Markdown (--json: for Session.load)
    tinychat chats rm 3 5         delete chats; for a week they can be brought back
    tinychat chats --deleted      those
    tinychat chats restore 3      bring one back
    """
    from tinychat.chats.chat_store import ChatStore, Hit, StoreError
    from tinychat.chats.export import to_json, to_markdown

    numbers = [int(w) for w in words[1:] if w.isdecimal() and len(w) <= 18]
    is_ids = bool(numbers) and len(numbers) == len(words) - 1
    store = ChatStore()
    try:
        store.purge()
    except StoreError as e:  # the next time will do
        click.echo(f"What was deleted long ago is not wiped yet: {e.what} {e.todo}", err=True)
    if store.notice:
        click.echo(store.notice, err=True)
    if deleted and words:
        raise click.UsageError("--deleted lists all of them; it takes no words.")
    if deleted:
        _list([Hit(c, []) for c in store.deleted()], "Nothing was deleted within a week.", as_json)
    elif words[:1] == ("rm",) and is_ids:
        _remove(store, numbers, as_json)
    elif words[:1] == ("restore",) and is_ids:
        _restore(store, numbers, as_json)
    elif words[:1] == ("export",) and is_ids and len(numbers) == 1:
        out = Printer()
        if as_json:
            out.write(to_json(store, numbers[0], ensure_ascii=not is_unicode(sys.stdout)))
        else:
            out.write(to_markdown(store, numbers[0]))
        out.end()
    elif len(words) == 1 and words[0] in ACTIONS:
        raise click.UsageError(f"Which chat? tinychat chats {words[0]} ID; tinychat chats lists them.")
    else:
        search = whole(" ".join(words))
        nothing = "Nothing found." if search else "No chats yet. tinychat run starts one."
        most = ALL if everything else MOST
        hits = store.search(search, most + 1)
        _list(hits[:most], nothing, as_json)
        if len(hits) > most:
            narrower = "More words find fewer" if search else "A word finds fewer"
            click.echo(
                f"There are more than these {most}, the newest. {narrower}; --all shows all.", err=True
            )


def _remove(store: ChatStore, ids: list[int], as_json: bool) -> None:
    found = [store.chat(i) for i in ids]  # all of them, or none
    for chat in found:
        store.lock(chat.id)()  # not while it is open somewhere
    for chat in found:
        store.delete(chat.id)
        if not as_json:
            todo = f"tinychat chats restore {chat.id} brings it back"
            click.echo(f"Deleted “{chat.title}”; it is wiped after a week, until then {todo}.", err=True)
    if as_json:
        Printer().line(json.dumps({"deleted": ids}))


def _restore(store: ChatStore, ids: list[int], as_json: bool) -> None:
    titles = {c.id: c.title for c in store.deleted()}
    for number in ids:  # all of them, or none
        if number not in titles:
            raise TinychatError(
                f"No chat {number} was deleted within a week.", "See tinychat chats --deleted."
            )
    for number in ids:
        store.restore(number)
        if not as_json:
            click.echo(f"“{titles[number]}” is back.", err=True)
    if as_json:
        Printer().line(json.dumps({"restored": ids}))


def _list(hits: list[Hit], nothing: str, as_json: bool) -> None:
    out = Printer()
    if as_json:
        rows = [{**asdict(h.chat), "excerpt": h.excerpt} for h in hits]
        out.json(rows, indent=2)
        return
    if not hits:
        click.echo(nothing, err=True)
        return
    searched = any(h.pieces for h in hits)
    if searched and sys.stdout.isatty():
        for h in hits:
            click.echo("  ".join(_row(h)))
            _show_excerpt(h)
        return
    tables.show((*_row(h), *((_plain(h),) if searched else ())) for h in hits)


def _row(hit: Hit) -> tuple[str, str, str]:
    return (
        f"{hit.chat.id:>5}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(hit.chat.updated)),
        terminal.one_line(f"{hit.chat.title}  ({hit.chat.messages} messages, {hit.chat.model})"),
    )


def _plain(hit: Hit) -> str:
    return " ".join(hit.excerpt.split())


def _show_excerpt(hit: Hit) -> None:
    """A line under a chat, as wide as the terminal, with what was found in it."""
    from rich.text import Text

    from tinychat.tui.excerpts import FOUND, fitted

    if hit.pieces:
        out = terminal.console()
        line = fitted(hit.pieces, max(20, out.width - INDENT - 1))
        shown = [(text, "bold" if style == FOUND else "dim") for text, style in line]
        out.print(Text.assemble(" " * INDENT, *shown, end=""), no_wrap=True, soft_wrap=True)


commands = [chats]
