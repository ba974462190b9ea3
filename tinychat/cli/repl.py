"""The line-by-line conversation: `tinychat run --plain`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import errors, locations
from tinychat.cli import calls
from tinychat.cli.output import Printer, cancel_on_interrupt, describe, show_events
from tinychat.cli.repl_commands import ReplCommands
from tinychat.mcp.toolbox import MOST_ROUNDS, STOPPED, Toolbox
from tinychat.tui import commands, completing

if TYPE_CHECKING:
    from tinychat.chats.keeper import Keeper

HISTORY = 1000  # messages


class Repl(ReplCommands):
    """Reads lines, shows answers. ↑ brings back what was said before, in stored chats too."""

    def __init__(
        self,
        session: Any,
        keeper: Keeper,
        verbose: bool = False,
        toolbox: Toolbox | None = None,
        load_model: Callable[[str], Any] | None = None,
    ):
        """session: a Session or a RemoteSession. keeper: stores the conversation. toolbox: what the model may
        be told of; each call asks. load_model: another model by its name.
        """
        self.load_model = load_model
        self.session, self.keeper, self.verbose = session, keeper, verbose
        self.toolbox = toolbox or Toolbox()
        self.last = None
        self._warned = False  # of what leaving would lose

    def run(self) -> None:
        """Until /exit, end of input, or Ctrl+C twice (which raises KeyboardInterrupt)."""
        self._history()
        model = self.session.model
        facts = model.describe()
        ctx = f" · {facts['ctx']} tokens of context" if facts.get("ctx") else ""
        click.echo(f"{model.name} · {facts['backend']}{ctx} · /help", err=True)
        warned = False
        while True:
            if news := self.keeper.held.news():
                self._warned = False
                click.echo(news, err=True)
            if news := self.toolbox.news():
                click.echo(news, err=True)
            try:
                text = self._read()
            except EOFError:
                click.echo(err=True)
                if self.may_leave():
                    return
                continue
            except KeyboardInterrupt:
                if warned:
                    raise
                warned = True
                click.echo("\nCtrl+C again to leave.", err=True)
                continue
            warned = False
            if not text.strip():
                continue
            try:
                if command := commands.split(text):
                    if self.run_command(*command):
                        return
                else:
                    self.answer(self.session.send(text))
            except BrokenPipeError:
                raise
            except Exception as e:  # whatever it is, the conversation goes on
                if os.environ.get("TINYCHAT_DEBUG"):
                    traceback.print_exception(e)
                error = errors.of(e)
                click.echo(f"{error.what} {error.todo}", err=True)

    def answer(self, events) -> None:
        """Show an answer and, where it calls tools, those to their results."""
        for _ in range(MOST_ROUNDS):
            calls.offer(self.toolbox, self.session)
            self._show(events)
            if self.last is None or self.last.finish_reason != "tool_calls":
                return
            found = calls.results(self.toolbox, self.session, calls.ask)
            if found is None:
                self.keeper.keep(self.session)
                return
            events = self.session.send_results(found)
        self._show(events)
        if self.last is not None and self.last.finish_reason == "tool_calls":
            self.session.add_results([STOPPED] * len(self.session.tree.unanswered()))
            self.keeper.keep(self.session)
            click.echo(f"({MOST_ROUNDS} answers in a row called tools: say something to go on)", err=True)

    def _show(self, events) -> None:
        out = Printer()
        self.session.ends_circles = True
        with cancel_on_interrupt(self.session):
            self.last = show_events(self.keeper.follow(self.session, events), out)
        if self.last is None:
            return
        reason = self.last.finish_reason
        more = ": /continue goes on" if self.session.continues else ""
        if reason == "cancelled":
            click.echo(f"(stopped{more})", err=True)
        elif reason == "context_full":
            click.echo(
                f"(the context of {self.session.model.n_ctx} tokens is full: /new starts over)", err=True
            )
        elif reason == "repeating":
            click.echo(
                "(stopped: repeating; /set repeat_penalty 1.1 and /regen, or /continue goes on)", err=True
            )
        elif reason == "length":
            click.echo(f"(cut by max_tokens{more})", err=True)
        if self.verbose:
            click.echo(describe(self.last.stats), err=True)

    def may_leave(self) -> bool:
        """Whether nothing would be lost, or that was said."""
        lost = self.keeper.store.loss()
        if self._warned or not lost:
            return True
        self._warned = True
        click.echo(f"{lost} Leave again to lose it; /save FILE keeps it elsewhere.", err=True)
        return False

    def _read(self) -> str:
        line = input(">>> ")
        if line.strip() == '"""':
            lines = []
            while (line := input("... ")).strip() != '"""':
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("... ")
        return line

    def _history(self) -> None:
        """Lines that ↑ brings back. Only the store keeps them."""
        try:
            import readline
        except ImportError:
            return
        # An earlier version kept all that was typed, under --no-store too, in a file of its own.
        with suppress(OSError):
            (locations.home() / "history").unlink()
        readline.clear_history()
        readline.set_completer(self._completion)
        readline.set_completer_delims("")  # it completes whole lines
        readline.parse_and_bind("tab: complete")
        with suppress(errors.TinychatError):
            for text in reversed(self.keeper.store.said(HISTORY)):
                if "\n" not in text:
                    with suppress(ValueError):  # a NUL, or characters that the terminal's encoding lacks
                        readline.add_history(text)

    def _completion(self, line: str, n: int) -> str | None:
        """The nth way in which the line may go on, for readline."""
        with suppress(Exception):  # pressing tab is no moment for an error
            found = completing.lines(line, self.keeper.store, self.session.tree)
            return found[n] if n < len(found) else None
        return None
