"""Actions of commands, keys and clicks on the chat screen."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tinychat.base import locations, prompts
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import read_bytes, write_atomically
from tinychat.base.sampling_params import SamplingParams
from tinychat.chats.chat_store import Chat
from tinychat.chats.export import json_of, markdown_of
from tinychat.tui import clipboard, commands, messages
from tinychat.tui.conversation import Conversation
from tinychat.tui.markdown import Document
from tinychat.tui.screens.places import Places
from tinychat.tui.theme import SHORT_NAMES, THEMES
from tinychat.tui.widgets.surface import Row
from tinychat.tui.widgets.turn import Turn, human_size
from tinychat.tui.words import Words

PENALTY = {"repeat_penalty": 1.15}  # of an answer in place of one that ran in a circle


# One file because it is a flat list: a short method for each thing that a user can do.
class ChatActions(Places):
    """A method for each command, for what is done with a message or a chat, and for each key."""

    async def on_submitted(self, message: messages.Submitted) -> None:
        """Enter: a command, a new message, or an edited one."""
        if command := commands.split(message.text):
            await self._submit_command(message.text, *command)
            return
        await self._submit(Words(message.text, message.attachments))

    async def _submit_command(self, text: str, name: str, rest: str) -> None:
        """One that was mistyped stays in the line."""
        known = commands.BY_NAME.get(name)
        if known is None:
            self.complain(commands.unknown(name))
            return
        self.composer.clear()
        self.say("")
        done = await self.run_command(name, rest)
        if not done and (rest or known.needs_argument) and not self.composer.text:
            self.composer.text = text

    async def _submit(self, words: Words) -> None:
        if not self.answering:
            await self.say_words(words)
        elif self.editing is not None:
            self.say(f"Still answering: {self.key('stop')} stops it.")
        else:
            self.composer.queue.put(replace(words, waited=True))
            self.composer.clear()
            self.say("")

    async def say_words(self, words: Words) -> None:
        """Send them; first it is made sure that the model can read them."""
        if self.ready and words.may_exceed(self.context):
            weighed = self.weigh(words, self.send, partial(self._not_said, words))
            self.run_worker(weighed, group="weigh", exclusive=True)
        else:
            await self.send(words)

    def _not_said(self, words: Words) -> None:
        if words.waited:
            self.composer.queue.put(words)
            self.composer.take_back()

    async def run_command(self, name: str, rest: str) -> bool:
        """A slash command; False where it was refused, which has been said then."""
        command = commands.BY_NAME.get(name)
        try:
            if command is None:
                raise commands.unknown(name)
            if command.needs_argument and not rest:
                raise UsageError(f"/{name} needs {command.argument}.", f"/{name} {command.argument}")
            result = getattr(self, f"command_{command.name}")(rest)
            if result is not None:
                await result
        except TinychatError as e:
            self.complain(e)
            return False
        return True

    def command_help(self, rest: str) -> None:
        self.action_help()

    def command_model(self, rest: str) -> Any:
        if rest:
            return self.choose_model(rest)
        self.action_model()
        return None

    async def command_system(self, rest: str) -> None:
        if rest:
            await self.set_system("" if rest == "-" else rest)
        else:
            self.action_edit_system()

    async def set_system(self, text: str) -> None:
        """The system prompt of this chat; empty: none."""
        chat = self.conversation.chat
        chat.system = text or None
        self.conversation.keep()
        await self.name_chat()
        self.say(
            f"System prompt: {chat.system}" if chat.system else "No system prompt: the template's own holds."
        )

    def action_edit_system(self) -> None:
        """A click on it."""
        from tinychat.tui.screens.system import SystemScreen

        def done(text: str | None) -> None:
            if text is not None:
                self.run_worker(self.set_system(text), group="system")

        self.app.push_screen(SystemScreen(self.conversation.chat.system or ""), done)

    def action_edit_title(self) -> None:
        """A click on it."""
        chat = self.conversation.chat
        self.app.ask_text("New title", chat.title, lambda title: self.rename(chat.id, title))

    def command_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self.set_params({name: SamplingParams.parse(name, value.strip())})
        else:
            self.action_sampling()

    def set_params(self, changes: dict[str, Any]) -> None:
        """Sampling parameters of this chat; None is the model's default."""
        chat = self.conversation.chat
        merged = {**chat.params, **changes}
        chat.params = {k: v for k, v in merged.items() if v is not None}
        self.conversation.keep()
        self.say(
            "Sampling: " + (", ".join(f"{k} {v}" for k, v in chat.params.items()) or "the model's defaults")
        )

    def command_regen(self, rest: str) -> Any:
        return self.regenerate()

    async def regenerate(self, question: int | None = None, once: Mapping[str, Any] | None = None) -> None:
        """Answer a question (default: the last one) again; once: sampling parameters of this answer alone."""
        if self.answering:
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")
        if question is None:
            question = self.conversation.tree.question
        if question is None:
            raise UsageError("There is nothing to answer again.", "Say something first.")
        self.once = dict(once or {})
        await self.answer(question)

    def command_continue(self, rest: str) -> None:
        tree = self.conversation.tree
        if self.answering:
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")
        if tree.leaf is None or tree.nodes[tree.leaf].role != "assistant":
            raise UsageError("There is no answer to go on with.", "Say something, or /regen.")
        if tree.nodes[tree.leaf].finish_reason in ("stop", "tool_calls"):
            raise UsageError("The answer came to its end by itself.", "Ask for more, or /regen.")
        self.go_on(tree.leaf)

    async def command_edit(self, rest: str) -> None:
        tree = self.conversation.tree
        last = tree.last("user")
        if last is None:
            raise UsageError("There is nothing to edit.", "Say something first.")
        self.begin_edit(last)
        if rest:
            await self.on_submitted(messages.Submitted(rest, tree.nodes[last].attachments))

    def begin_edit(self, node: int) -> None:
        """Put a message of the user into the composer."""
        if self.answering:
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")
        self.editing = node
        m = self.conversation.tree.nodes[node]
        self.composer.restore(m.content, m.attachments)
        self.composer.input.focus()
        self.say("Editing: enter sends it as a new branch, esc leaves it as it was.")

    def command_new(self, rest: str = "") -> Any:
        return self.action_new_chat()

    command_clear = command_new

    async def action_new_chat(self) -> None:
        """An empty conversation with the same model and settings."""
        if self.answering:
            self.say(f"Still answering: {self.key('stop')} stops it.")
            return
        chat = self.conversation.chat
        await self.open(Conversation(self.app.store, self.model, chat.system, chat.params))

    async def command_resume(self, rest: str) -> None:
        if rest.isdecimal() and len(rest) < 18:
            self.app.store.chat(int(rest))  # refuses a number that is none
            await self.on_open_chat(messages.OpenChat(int(rest)))
            return
        if self.sidebar is None or not self.sidebar.display:
            await self.action_toggle_sidebar()
        if self.sidebar is not None:
            self.sidebar.find(rest)

    def command_rename(self, rest: str) -> None:
        chat = self._begun_chat()
        if rest:
            self.rename(chat.id, rest)
        else:
            self.action_edit_title()

    async def command_delete(self, rest: str) -> None:
        if self.answering:
            raise UsageError("Still answering.", f"{self.key('stop')} stops it.")
        chat = self._begun_chat()
        if not chat.id:
            raise UsageError("This chat is not stored.", "/new begins another one.")
        self.app.store.delete(chat.id)
        await self.action_new_chat()
        self._deleted(chat.title)

    def delete_chat(self, chat_id: int) -> None:
        """Out of the list; /undo brings it back. The open chat is not hit by a key too many."""
        if chat_id == self.conversation.chat.id:
            raise UsageError("This chat is open.", "/delete deletes it.")
        title = self.app.store.chat(chat_id).title
        self.app.store.lock(chat_id)()  # not while it is open somewhere
        self.app.store.delete(chat_id)
        self._deleted(title)

    def _deleted(self, title: str) -> None:
        self.refill()
        self.say(f"Deleted “{title}”. /undo brings it back, for a week.")

    async def command_undo(self, rest: str = "") -> None:
        deleted = self.app.store.deleted()
        if not deleted:
            raise UsageError("Nothing was deleted within a week.", "/resume lists the chats.")
        self.app.store.restore(deleted[0].id)
        self.refill()
        if not self.conversation.tree.nodes:
            await self.on_open_chat(messages.OpenChat(deleted[0].id))
        more = f" /undo again: “{deleted[1].title}”." if deleted[1:] else ""
        self.say(f"“{deleted[0].title}” is back.{more}")

    def command_save(self, rest: str) -> None:
        self._begun_chat()
        self.export(0, locations.written(rest))

    def export(self, chat_id: int, path: Path) -> None:
        """A chat (0: this one, stored or not) as a file: JSON for a .json, else Markdown."""
        if chat_id in (0, self.conversation.chat.id):
            chat, tree = self.conversation.chat, self.conversation.tree
        else:
            chat, tree, _ = self.app.store.tree(chat_id)
        self.write_file(path, (json_of if path.suffix == ".json" else markdown_of)(chat, tree))

    def write_file(self, path: Path, text: str) -> None:
        """Write a new file; an existing one is not touched."""
        if os.path.lexists(path):  # which takes every name
            raise UsageError(f"{path} exists.", "Give another name.")
        content = text.encode("utf-8", "replace")
        write_atomically(path, content)
        self.say(f"Wrote {path} ({human_size(len(content))}).")

    def command_copy(self, rest: str) -> None:
        tree = self.conversation.tree
        last = tree.last("assistant")
        if rest == "chat":
            self._copy(markdown_of(self.conversation.chat, tree), "the chat")
        elif last is None:
            raise UsageError("There is no answer yet.", "Say something first.")
        elif rest == "code":
            self._copy_code(self.transcript.turn(last), -1)
        elif not rest:
            self._copy(tree.nodes[last].split()[1], "the answer")
        else:
            raise UsageError(f"/copy {rest} means nothing.", "Use /copy, /copy code or /copy chat.")

    def _copy(self, text: str, what: str) -> None:
        clipboard.copy(self.app, text)
        self.say(f"Copied {what} ({human_size(len(text.encode('utf-8', 'replace')))}).")

    def _code(self, turn: Turn | None, index: int) -> str:
        code = turn.code(index) if turn is not None else None
        if code is None and turn is not None and not turn.is_answer:
            document = Document()
            document.append(turn.message.content)
            document.end()
            document.advance()
            with suppress(IndexError):
                code = document.codes[index]
        if code is None:
            raise UsageError("There is no code block in that message.", "Choose another one.")
        return code

    def _copy_code(self, turn: Turn | None, index: int) -> None:
        self._copy(self._code(turn, index), "the code block")

    def command_think(self, rest: str) -> None:
        turns = [t for t in self.transcript.turns if t.thought is not None]
        if not turns:
            raise UsageError("There is no reasoning here.", "This model may not show any.")
        turns[-1].action_unfold()

    def command_stats(self, rest: str) -> None:
        self.action_stats()

    async def command_prompt(self, rest: str) -> None:
        name, _, words = rest.partition(" ")
        prompt, chat = prompts.find(name), self.conversation.chat
        text = prompt.filled(words)
        if not self.conversation.tree.nodes:  # a chat that has begun keeps its own
            chat.system = chat.system if prompt.system is None else prompt.system
            chat.params = {**chat.params, **prompt.sampling}
        await self._submit(Words(text, []))

    def command_default(self, rest: str) -> None:
        chat, path = self.conversation.chat, self.app.preferences.path
        try:
            self.app.preferences.keep_chat(self.model, chat.system, SamplingParams.sound(chat.params))
        except OSError as e:
            raise TinychatError(f"{path} cannot be written: {e.strerror}.", "Make room, or mend it.") from e
        self.say(f"New chats begin like this one: {path}")

    def command_theme(self, rest: str) -> None:
        names = {**SHORT_NAMES, **{name: name for name in self.app.available_themes}}
        if rest and rest not in names:
            raise UsageError(f"There is no theme {rest}.", f"Use {', '.join(SHORT_NAMES)}.")
        if not rest:
            ours = [t.name for t in THEMES]
            at = ours.index(self.app.theme) if self.app.theme in ours else -1
            names[rest] = ours[(at + 1) % len(ours)]
        self.app.theme = names[rest]

    def command_exit(self, rest: str) -> None:
        self.app.leave()

    def _begun_chat(self) -> Chat:
        if not self.conversation.tree.nodes:
            raise UsageError("This chat is still empty.", "Say something first.")
        return self.conversation.chat

    # Messages

    async def on_turn_action(self, message: Turn.Action) -> None:
        """A key or a click on a message."""
        turn, m = message.turn, message.turn.message
        question = m.parent if turn.is_answer else turn.node
        self.say("")
        try:
            if message.action == "leave":
                self.composer.input.focus()
            elif message.action == "move":
                self._move(turn, message.argument)
            elif message.action == "switch":
                at = (turn.branches.index(turn.node) + message.argument) % len(turn.branches)
                await self.switch(turn.branches[at])
            elif message.action == "edge":
                await self._edge(message.argument)
            elif message.action == "half":
                transcript = self.transcript
                half = message.argument * max(1, transcript.size.height // 2)
                transcript.scroll_relative(y=half, animate=False)
            elif message.action == "found":
                await self.next_found(message.argument)
            elif message.action == "copy":
                text = m.split()[1] if turn.is_answer else m.content
                self._copy(text, "the message")
            elif message.action == "copy_code":
                self._copy_code(turn, message.argument)
            elif message.action == "save_code":
                code = self._code(turn, message.argument)
                self.app.ask_path("Save the code block as", lambda path: self.write_file(path, code))
            elif message.action == "edit":
                if (asked := self.conversation.tree.asked(turn.node)) is not None:
                    self.begin_edit(asked)
            elif message.action == "continue":
                self.command_continue("")
                self.composer.input.focus()
            elif message.action in ("regenerate", "penalize"):
                await self.regenerate(question, PENALTY if message.action == "penalize" else {})
                self.composer.input.focus()
        except TinychatError as e:
            self.complain(e)

    def _move(self, turn: Turn, step: int) -> None:
        turns = self.transcript.turns
        at = turns.index(turn) + step
        if at >= len(turns):
            self.composer.input.focus()
        elif at >= 0:
            turns[at].focus()
        else:
            self.transcript.scroll_home(animate=False)

    async def _edge(self, step: int) -> None:
        path = self.conversation.tree.path()
        if step < 0:
            await self.show_message(path[0])
            self.call_after_refresh(self.transcript.scroll_home, animate=False)
        else:
            self.action_focus_last()

    def action_focus_last(self) -> None:
        """From the composer to the last message."""
        if turns := self.transcript.turns:
            turns[-1].focus()

    async def on_chat_action(self, message: messages.ChatAction) -> None:
        """A key in the list of chats."""
        try:
            if message.action == "delete":
                self.delete_chat(message.chat_id)
            elif message.action == "undo":
                await self.command_undo()
            elif message.action == "export":
                self.app.ask_path("Export as (.md or .json)", lambda path: self.export(message.chat_id, path))
            elif message.action == "rename":
                chat = self.app.store.chat(message.chat_id)
                self.app.ask_text("New title", chat.title, lambda title: self.rename(message.chat_id, title))
        except TinychatError as e:
            self.complain(e)

    def rename(self, chat_id: int, title: str) -> None:
        """Give a chat another title."""
        if title.strip():
            if chat_id == self.conversation.chat.id:
                self.conversation.chat.title = title.strip()
                self.conversation.keep()
                self.run_worker(self.name_chat(), group="name")
            else:
                self.app.store.update(chat_id, title=title.strip())
            self.refill()

    async def on_attached(self, message: messages.Attached) -> None:
        """Count the tokens of what is attached, as soon as the engine can."""
        self.tell_room(aloud=False)
        for attachment in self.composer.attachments:
            if not attachment.problem and attachment.tokens is None:
                self.run_worker(self._count(attachment), group="count")

    async def _count(self, attachment: Any) -> None:
        attachment.tokens = await self.app.engine.count(attachment.text)
        self.composer.chips.show(self.composer.attachments)

    # Keys

    async def action_regenerate(self) -> None:
        """ctrl+r."""
        await self.run_command("regen", "")

    async def action_toggle_sidebar(self, focus: bool = True) -> None:
        """ctrl+b."""
        from tinychat.tui.widgets.sidebar import Sidebar

        if (sidebar := self.sidebar) is None:
            sidebar = Sidebar(self.app.store)
            sidebar.current = self.conversation.chat.id
            await self.query_one(Row).mount(sidebar, before=0)
            shown = True
        else:
            shown = sidebar.display = not sidebar.display
        self.set_class(shown, "with-sidebar")
        if shown:
            self.refill()
            sidebar.query_one("#search").focus()
        elif focus:
            self.composer.input.focus()

    def action_follow(self) -> None:
        """ctrl+end."""
        self.transcript.follow()

    def action_page(self, step: int) -> None:
        """The page keys scroll the conversation, wherever the cursor is."""
        (self.transcript.scroll_page_up if step < 0 else self.transcript.scroll_page_down)(animate=False)

    def action_help(self) -> None:
        """f1."""
        from tinychat.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def action_stats(self) -> None:
        """f2."""
        from tinychat.tui.screens.stats import StatsScreen

        self.app.push_screen(StatsScreen(self.conversation.path(), self.facts))

    def action_sampling(self) -> None:
        """ctrl+t."""
        from tinychat.tui.screens.sampling import SamplingScreen

        def done(changes: dict[str, Any] | None) -> None:
            if changes is not None:
                self.set_params(changes)

        self.app.push_screen(SamplingScreen(self.conversation.chat.params, self.defaults), done)

    async def action_editor(self) -> None:
        """ctrl+g: write in $EDITOR."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                path = Path(folder) / "message.md"
                path.write_text(self.composer.text, encoding="utf-8")
                try:
                    with self.app.suspend():  # the terminal is the editor's until it ends
                        code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
                except (OSError, ValueError) as e:
                    self.say(f"{editor} does not start: {e}. Set $EDITOR.", error=True)
                    return
                if code == 0:  # what the editor left there may be no file any more
                    self.composer.text = read_bytes(path).decode("utf-8", "replace").rstrip("\n")
        except OSError as e:  # the message stays in the composer
            said = e.strerror or e
            self.say(f"The message cannot go through a file: {said}. Check $TMPDIR and its disk.", error=True)
        self.composer.input.focus()
