"""`tinychat chats`: what was said before."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from tinychat.cli.chat import Printer


@click.command()
@click.option("--search", metavar="TEXT", default="", help="Only chats in which TEXT was said.")
@click.option(
    "--export", "export_id", type=click.IntRange(1), metavar="ID", help="Print chat ID (--json: as JSON)."
)
@click.option("--delete", "delete_id", type=click.IntRange(1), metavar="ID", help="Delete chat ID.")
@click.option("--json", "as_json", is_flag=True)
def chats(search: str, export_id: int | None, delete_id: int | None, as_json: bool) -> None:
    """Chats on this machine, newest first: `tinychat run --resume ID` goes on with one."""
    from tinychat.store import MARK, UNMARK, ChatStore

    store = ChatStore()
    out = Printer()
    if export_id is not None:
        out.write(store.export_json(export_id) if as_json else store.export_markdown(export_id))
        out.end()
        return
    if delete_id is not None:
        chat = store.chat(delete_id)
        store.lock(delete_id)()  # not while it is open somewhere
        store.delete(delete_id)
        if as_json:
            out.line(json.dumps({"deleted": delete_id}))
        else:
            click.echo(f"Deleted “{chat.title}”.", err=True)
        return
    hits = store.search(search)
    if as_json:
        rows = [{**asdict(h.chat), "excerpt": h.excerpt.replace(MARK, "").replace(UNMARK, "")} for h in hits]
        out.line(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    if not hits:
        click.echo("Nothing found." if search else "No chats yet. tinychat run starts one.", err=True)
        return
    for h in hits:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(h.chat.updated))
        out.write(f"{h.chat.id:>5}  {when}  {h.chat.title}  ({h.chat.messages} messages, {h.chat.model})\n")


commands = [chats]
