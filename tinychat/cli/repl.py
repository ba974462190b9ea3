"""The line-by-line conversation: `tinychat run --plain`."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import errors, locations
from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams
from tinychat.cli import calls
from tinychat.cli.output import Printer, cancel_on_interrupt, describe, show_events
from tinychat.mcp.toolbox import MOST_ROUNDS, STOPPED, Toolbox

if TYPE_CHECKING:
    from tinychat.chats.keeper import Keeper

HISTORY = 1000  # messages
HELP = f"""\
/help                 this list
/system [TEXT]        show or set the system prompt
/set [NAME VALUE]     show or set {", ".join(SamplingParams.numbers())}
/regen                answer again
/continue             go on with an answer that was stopped or cut
/edit TEXT            replace your last message
/stats                timings of the last answer, context used
/save FILE            write the conversation as JSON
/load FILE            read one back
/mcp [on|off|forget NAME]  MCP servers: their tools, and what you allow
/new                  start over (/clear)
/exit                 leave (/bye, Ctrl+D)
Text between lines of \"\"\" is one message; a \\ at a line's end continues it. Ctrl+C stops an answer."""


class Repl:
    """Reads lines, shows answers. ↑ brings back what was said before, in stored chats too."""

    def __init__(self, session: Any, keeper: Keeper, verbose: bool = False, toolbox: Toolbox | None = None):
        """session: a Session or a RemoteSession. keeper: stores the conversation. toolbox: what the model may
        be told of; each call asks.
        """
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
                if self._may_leave():
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
                if text.startswith("/") and "\n" not in text:
                    if self._command(*_split(text)):
                        return
                else:
                    self._answer(self.session.send(text))
            except BrokenPipeError:
                raise
            except Exception as e:  # whatever it is, the conversation goes on
                if os.environ.get("TINYCHAT_DEBUG"):
                    traceback.print_exception(e)
                error = errors.of(e)
                click.echo(f"{error.what} {error.todo}", err=True)

    def _answer(self, events) -> None:
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

    def _command(self, name: str, rest: str) -> bool:
        """Run a slash command; True to leave."""
        s = self.session
        if name in ("exit", "bye", "quit"):
            return self._may_leave()
        if name in ("help", "?"):
            click.echo(HELP, err=True)
        elif name == "system":
            if rest:
                s.system = rest
            click.echo(s.system or "(the chat template's own)", err=True)
        elif name == "set":
            self._set(rest)
        elif name == "regen":
            self._answer(s.regenerate())
        elif name == "continue":
            self._answer(s.go_on())
        elif name == "edit":
            users = [i for i in s.path() if s.nodes[i].role == "user"]
            if not users or not rest:
                raise UsageError("There is no message to edit, or no text.", "Use /edit NEW TEXT.")
            self._answer(s.edit(users[-1], rest))
        elif name == "stats":
            limit = f" of {s.model.n_ctx}" if s.model.n_ctx else ""
            click.echo(f"context {s.count_tokens()}{limit} tokens", err=True)
            if self.last is not None:
                click.echo(describe(self.last.stats), err=True)
        elif name == "save":
            if not rest:
                raise UsageError("No file is named.", "Use /save FILE.")
            s.save(locations.written(rest))
            click.echo(f"Saved {rest}", err=True)
        elif name == "load":
            self.session = type(s).load(locations.written(rest), s.model)
            for m in self.session.messages:
                click.echo(f"{m['role']}: {m['content']}", err=True)
        elif name == "mcp":
            for line in self.toolbox.command(rest):
                click.echo(line, err=True)
        elif name in ("new", "clear"):
            self.session = type(s)(s.model, s.system)
            self.session.params, self.last = s.params, None
            click.echo("(a new conversation)", err=True)
        else:
            raise UsageError(f"/{name} is not a command.", "/help lists them.")
        return False

    def _may_leave(self) -> bool:
        """Whether nothing would be lost, or that was said."""
        lost = self.keeper.store.loss()
        if self._warned or not lost:
            return True
        self._warned = True
        click.echo(f"{lost} Leave again to lose it; /save FILE keeps it elsewhere.", err=True)
        return False

    def _set(self, rest: str) -> None:
        s = self.session
        words = rest.split()
        if len(words) == 2:
            name, text = words
            value = SamplingParams.parse(name, text)
            if value is None:
                value = getattr(s.model.default_sampling, name)
            s.params = s.PARAMS.made({**vars(s.params), name: value})
        elif words:
            raise UsageError("/set takes a name and a value.", "Use /set temperature 0.2.")
        for name in SamplingParams.SETTINGS:
            value = getattr(s.params, name)
            unset = value is None and s.PARAMS is not SamplingParams
            click.echo(f"{name} {'(as the server has it)' if unset else value}", err=True)

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
        with suppress(errors.TinychatError):
            for text in reversed(self.keeper.store.said(HISTORY)):
                if "\n" not in text:
                    with suppress(ValueError):  # a NUL, or characters that the terminal's encoding lacks
                        readline.add_history(text)


def _split(text: str) -> tuple[str, str]:
    name, _, rest = text[1:].partition(" ")
    return name, rest.strip()
