"""The line-by-line conversation: `tinychat run --plain`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click

from tinychat import locations
from tinychat.cli.chat import Printer, cancel_on_interrupt, describe, show_events
from tinychat.errors import TinychatError, UsageError
from tinychat.sampling import SamplingParams
from tinychat.session import Session

HELP = """\
/help                 this list
/system [TEXT]        show or set the system prompt
/set [NAME VALUE]     show or set temperature, top_k, top_p, min_p, repeat_penalty, max_tokens, seed
/regen                answer again
/edit TEXT            replace your last message
/stats                timings of the last answer, context used
/save FILE            write the conversation as JSON
/load FILE            read one back
/new                  start over (/clear)
/exit                 leave (/bye, Ctrl+D)
Text between lines of \"\"\" is one message; a \\ at a line's end continues it. Ctrl+C stops an answer."""


class Repl:
    """Reads lines, shows answers. What was typed is kept for the next time (↑)."""

    def __init__(
        self,
        session: Session,
        verbose: bool = False,
        follow: Callable[[Session, Iterator], Iterator] = lambda _, events: events,
    ):
        """follow: sees the events of every answer on their way (to store them)."""
        self.session, self.verbose, self.follow = session, verbose, follow
        self.last = None

    def run(self) -> None:
        """Until /exit, end of input, or Ctrl+C twice (which raises KeyboardInterrupt)."""
        self._history()
        model = self.session.model
        facts = model.backend.describe()
        click.echo(f"{model.name} · {facts['backend']} · {model.n_ctx} tokens of context · /help", err=True)
        warned = False
        while True:
            try:
                text = self._read()
            except EOFError:
                click.echo(err=True)
                return
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
            except TinychatError as e:
                click.echo(f"{e.what} {e.todo}", err=True)

    def _answer(self, events) -> None:
        out = Printer()
        with cancel_on_interrupt(self.session):
            self.last = show_events(self.follow(self.session, events), out)
        if self.last is None:
            return
        reason = self.last.finish_reason
        if reason == "cancelled":
            click.echo("(stopped)", err=True)
        elif reason == "context_full":
            click.echo(
                f"(the context of {self.session.model.n_ctx} tokens is full: /new starts over)", err=True
            )
        elif reason == "length":
            click.echo("(cut by max_tokens)", err=True)
        if self.verbose:
            click.echo(describe(self.last.stats), err=True)

    def _command(self, name: str, rest: str) -> bool:
        """Run a slash command; True to leave."""
        s = self.session
        if name in ("exit", "bye", "quit"):
            return True
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
        elif name == "edit":
            users = [i for i in s.path() if s.nodes[i].role == "user"]
            if not users or not rest:
                raise UsageError("There is no message to edit, or no text.", "Use /edit NEW TEXT.")
            self._answer(s.edit(users[-1], rest))
        elif name == "stats":
            click.echo(f"context {s.count_tokens()} of {s.model.n_ctx} tokens", err=True)
            if self.last is not None:
                click.echo(describe(self.last.stats), err=True)
        elif name == "save":
            if not rest:
                raise UsageError("No file is named.", "Use /save FILE.")
            s.save(Path(rest).expanduser())
            click.echo(f"Saved {rest}", err=True)
        elif name == "load":
            self.session = Session.load(Path(rest).expanduser(), s.model)
            for m in self.session.messages:
                click.echo(f"{m['role']}: {m['content']}", err=True)
        elif name in ("new", "clear"):
            self.session = s.model.session(s.system)
            self.session.params, self.last = s.params, None
            click.echo("(a new conversation)", err=True)
        else:
            raise UsageError(f"/{name} is not a command.", "/help lists them.")
        return False

    def _set(self, rest: str) -> None:
        s = self.session
        words = rest.split()
        if len(words) == 2:
            kind = {"top_k": int, "max_tokens": int, "seed": int}.get(words[0], float)
            try:
                s.params = s.params.but(**{words[0]: kind(words[1])})
            except ValueError:
                raise UsageError(f"{words[1]} is not a number.", "Use /set NAME VALUE.") from None
        elif words:
            raise UsageError("/set takes a name and a value.", "Use /set temperature 0.2.")
        for name in SamplingParams.__dataclass_fields__:
            click.echo(f"{name} {getattr(s.params, name)}", err=True)

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
        try:
            import atexit
            import readline
        except ImportError:
            return
        path = locations.history_file()
        with suppress(OSError):  # the first time there is none
            readline.read_history_file(path)
        readline.set_history_length(1000)

        def keep() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)
            except OSError as e:
                print(f"The input history was not kept: {e}", file=sys.stderr)

        atexit.register(keep)


def _split(text: str) -> tuple[str, str]:
    name, _, rest = text[1:].partition(" ")
    return name, rest.strip()
