"""The slash commands of the plain conversation: those of the screen, by the same names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import locations, prompts, terminal
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import write_atomically
from tinychat.base.preferences import Preferences
from tinychat.base.sampling_params import SamplingParams
from tinychat.chats import outline
from tinychat.cli.compact import compact
from tinychat.cli.output import describe
from tinychat.tui import branches, commands
from tinychat.tui.commands import BY_NAME, COMMANDS

if TYPE_CHECKING:
    from tinychat.base.events import Done
    from tinychat.chats.keeper import Keeper
    from tinychat.chats.records import Chat
    from tinychat.mcp.toolbox import Toolbox

NOTES = """\
Text between lines of \"\"\" is one message; a \\ at a line's end continues it.
Tab completes, Ctrl+C stops an answer, Ctrl+D leaves."""
FOUND = 10  # chats that /resume lists


def say(text: str) -> None:
    """A line beside the conversation."""
    click.echo(text, err=True)


class ReplCommands:
    """A method for each command; those that only a screen can do say so."""

    session: Any
    keeper: Keeper
    toolbox: Toolbox
    last: Done | None
    load_model: Callable[[str], Any] | None  # another model by name, in place of the present one

    def answer(self, events: Any) -> None:
        """Show an answer."""
        raise NotImplementedError

    def may_leave(self) -> bool:
        """Whether nothing would be lost, or that was said."""
        raise NotImplementedError

    def run_command(self, name: str, rest: str) -> bool:
        """Run a slash command; True to leave. Raises TinychatError."""
        command = BY_NAME.get("help" if name == "?" else name)
        if command is None:
            raise commands.unknown(name)
        if command.screen:
            raise UsageError(f"/{name} is for the chat screen: {command.screen}.", "/help lists the others.")
        if command.needs_argument and not rest:
            raise UsageError(f"/{name} needs {command.argument}.", f"/{name} {command.argument}")
        return bool(getattr(self, f"command_{command.name}")(rest))

    def command_help(self, rest: str) -> None:
        for c in COMMANDS:
            if not c.screen:
                say(f"{f'/{c.name} {c.argument}'.strip():<28}  {c.plain or c.help}")
        say(NOTES)

    def command_exit(self, rest: str) -> bool:
        return self.may_leave()

    # What is said

    def command_regen(self, rest: str) -> None:
        self.answer(self.session.regenerate())

    def command_continue(self, rest: str) -> None:
        self.answer(self.session.go_on())

    def command_compact(self, rest: str) -> None:
        compact(self.session, self.keeper)

    def command_edit(self, rest: str) -> None:
        last = self.session.tree.last("user")
        if last is None or not rest:
            raise UsageError("There is no message to edit, or no text.", "Use /edit NEW TEXT.")
        self.answer(self.session.edit(last, rest))

    def command_prompt(self, rest: str) -> None:
        name, _, words = rest.partition(" ")
        prompt, s = prompts.find(name), self.session
        text = prompt.filled(words)
        if not s.nodes:  # a chat that has begun keeps its own
            s.system = s.system if prompt.system is None else prompt.system
            s.params = s.PARAMS.made({**vars(s.params), **prompt.sampling})
        self.answer(s.send(text))

    def command_mcp(self, rest: str) -> None:
        for line in self.toolbox.command(rest):
            say(line)

    # How

    def command_system(self, rest: str) -> None:
        if rest:
            self.session.system = None if rest == "-" else rest
            self.keeper.keep(self.session)
        say(
            f"System prompt: {self.session.system}"
            if self.session.system
            else "No system prompt: the template's own holds."
        )

    def command_set(self, rest: str) -> None:
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
            say(f"{name} {'(as the server has it)' if unset else value}")

    def command_model(self, rest: str) -> None:
        if not rest:
            say(f"{self.session.model.name}. /model NAME takes another one; tinychat list shows them.")
            return
        if self.load_model is None:
            raise UsageError("The model stays.", "Start again: tinychat run MODEL -c.")
        old = self.session
        model = self.load_model(rest)
        session = model.session(old.system)
        own = {n: v for n, v in vars(old.params).items() if v != getattr(old.model.default_sampling, n)}
        session.params = session.PARAMS.made({**vars(session.params), **own})
        self.keeper.change(session)
        self.session = session
        say(f"{model.name} answers from now on.")

    def command_default(self, rest: str) -> None:
        s = self.session
        own = {n: v for n, v in vars(s.params).items() if v != getattr(s.model.default_sampling, n)}
        preferences = Preferences.read()
        try:
            preferences.keep_chat(s.model.name, s.system, SamplingParams.sound(own))
        except OSError as e:
            raise TinychatError(
                f"{preferences.path} cannot be written: {e.strerror}.", "Make room, or mend it."
            ) from e
        say(f"New chats begin like this one: {preferences.path}")

    def command_stats(self, rest: str) -> None:
        s = self.session
        limit = f" of {s.model.n_ctx}" if s.model.n_ctx else ""
        say(f"context {s.count_tokens()}{limit} tokens")
        if self.last is not None:
            say(describe(self.last.stats))

    # Where

    def command_branch(self, rest: str) -> None:
        tree = self.session.tree
        last = tree.last("assistant")
        if last is None:
            raise UsageError("There is no answer yet.", "Say something first.")
        siblings = tree.siblings(last)
        numbers = [str(n + 1) for n in range(len(siblings))]
        if rest and rest not in numbers:
            raise UsageError(f"There is no branch {rest}.", f"Use /branch 1 to {len(siblings)}.")
        at = numbers.index(rest) if rest else (siblings.index(last) + 1) % len(siblings)
        self._switch(siblings[at])

    def command_tree(self, rest: str) -> None:
        self.keeper.keep(self.session)  # the chat knows who gave each answer
        found = outline.outline(self.keeper.held.tree) if self.session.nodes else []
        if not found:
            raise UsageError("This chat is still empty.", "Say something first.")
        say(branches.headline(found))
        for line in branches.rows(found, terminal.console(err=True).width - 1):
            say("".join(text for text, _ in line).rstrip())
        say("/go N goes to one.")

    def command_go(self, rest: str) -> None:
        branch = outline.numbered(self.session.tree, rest)
        if branch.on_path:
            say("You are there already.")
            return
        self._switch(branch.start)

    def _switch(self, node: int) -> None:
        s = self.session
        s.switch(node)
        self.keeper.keep(s)
        self._recount(s.path()[-2:])

    def _recount(self, places: list[int]) -> None:
        """Say again what was said there."""
        for i in places:
            m = self.session.nodes[i]
            said = m.split()[1] if m.role == "assistant" else m.content
            say(f"{'>>> ' if m.role == 'user' else ''}{terminal.clean(said)}")

    # Chats

    def command_new(self, rest: str) -> None:
        old = self.session
        self.session = type(old)(old.model, old.system)
        self.session.params, self.last = old.params, None
        say("(a new conversation)")

    command_clear = command_new

    def command_resume(self, rest: str) -> None:
        store = self.keeper.store
        if rest.isdecimal() and len(rest) < 18:
            self._open(store.chat(int(rest)))
            return
        hits = store.search(rest, FOUND + 1)
        if not hits:
            raise UsageError("Nothing found.", "Use other words.")
        for hit in hits[:FOUND]:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(hit.chat.updated))
            say(f"{hit.chat.id:>5}  {when}  {terminal.one_line(hit.chat.title)}")
        more = "There are more: other words find fewer. " if len(hits) > FOUND else ""
        say(f"{more}/resume ID opens one.")

    def _open(self, chat: Chat) -> None:
        old = self.session
        if chat.id == self.keeper.held.chat.id and self.keeper.session is old:
            raise UsageError("This chat is open.", "/tree shows its branches.")
        session = type(old)(old.model, chat.system)
        session.params = session.PARAMS.made({**vars(session.params), **chat.params})
        self.keeper.open(session, chat)
        self.session, self.last = session, None
        say(terminal.one_line(chat.title))
        self._recount(session.path()[-2:])

    def _begun_chat(self) -> Chat:
        if not self.session.nodes:
            raise UsageError("This chat is still empty.", "Say something first.")
        self.keeper.keep(self.session)
        return self.keeper.held.chat

    def command_rename(self, rest: str) -> None:
        chat = self._begun_chat()
        if not rest:
            say(terminal.one_line(chat.title))
            return
        chat.title = rest
        self.keeper.held.change()
        self.keeper.held.flush()
        say(f"This chat is “{terminal.one_line(rest)}” now.")

    def command_delete(self, rest: str) -> None:
        chat = self._begun_chat()
        if not chat.id:
            raise UsageError("This chat is not stored.", "/new begins another one.")
        self.keeper.store.delete(chat.id)
        self.keeper.close(wait=0)
        self.command_new("")
        say(f"Deleted “{terminal.one_line(chat.title)}”. /undo brings it back, for a week.")

    def command_undo(self, rest: str) -> None:
        store = self.keeper.store
        deleted = store.deleted()
        if not deleted:
            raise UsageError("Nothing was deleted within a week.", "/resume lists the chats.")
        store.restore(deleted[0].id)
        if not self.session.nodes:
            self._open(store.chat(deleted[0].id))
        more = f" /undo again: “{terminal.one_line(deleted[1].title)}”." if deleted[1:] else ""
        say(f"“{terminal.one_line(deleted[0].title)}” is back.{more}")

    def command_save(self, rest: str) -> None:
        path = locations.written(rest)
        if path.suffix == ".json":
            self.session.save(path)
        else:
            from tinychat.chats.export import markdown_of

            if os.path.lexists(path):
                raise UsageError(f"{path} exists.", "Give another name.")
            text = markdown_of(self._begun_chat(), self.keeper.held.tree)
            write_atomically(path, text.encode("utf-8", "replace"))
        say(f"Saved {rest}")

    def command_load(self, rest: str) -> None:
        s = self.session
        self.session = type(s).load(locations.written(rest), s.model)
        self.last = None
        for m in self.session.messages:
            say(f"{m['role']}: {m['content']}")

    def command_think(self, rest: str) -> None:
        thoughts = [t for m in self.session.tree.messages() if (t := m.split()[0])]
        if not thoughts:
            raise UsageError("There is no reasoning here.", "This model may not show any.")
        say(terminal.clean(thoughts[-1].strip()))
