"""The conversation: what was said, where one writes, what the machine is doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Static

from tinychat.base.errors import TinychatError
from tinychat.tui import commands, messages
from tinychat.tui.conversation import Conversation
from tinychat.tui.screens.actions import ChatActions
from tinychat.tui.screens.hearing import Hearing, status_of
from tinychat.tui.screens.too_large import TooLargeScreen
from tinychat.tui.text import clean
from tinychat.tui.widgets.composer import Composer
from tinychat.tui.widgets.sidebar import Sidebar
from tinychat.tui.widgets.status import StatusLine
from tinychat.tui.widgets.surface import Column, Row, Surface
from tinychat.tui.widgets.transcript import Transcript
from tinychat.tui.widgets.turn import Turn, duration
from tinychat.tui.words import Words

if TYPE_CHECKING:
    from tinychat.tui.app import ChatApp

TICK = 0.5  # seconds between two looks at what is shown beside the text
NARROW = 90
MARGIN = 64  # tokens that a template may write around a message
PATIENCE = 10.0  # seconds that an engine may take to count tokens

WELCOME = """\
Ask something. Everything you say is kept on this machine.

enter send · ctrl+j new line · / commands · @file attach · esc stop
ctrl+b chats · ctrl+p everything else · f1 keys · ctrl+q leave"""


class ChatScreen(ChatActions, Hearing, Surface, Screen[None]):
    """One conversation at a time."""

    BINDING_GROUP_TITLE = "Everywhere"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "stop the answer; what was said stays"),
        Binding("ctrl+b", "toggle_sidebar", "chats, and search"),
        Binding("ctrl+n", "new_chat", "new chat"),
        Binding("ctrl+r", "regenerate", "answer again"),
        Binding("ctrl+o", "model", "choose the model"),
        Binding("ctrl+t", "sampling", "sampling"),
        Binding("f1", "help", "keys and commands"),
        Binding("f2", "stats", "speed and memory"),
        Binding("ctrl+end", "follow", "to the end of the conversation", priority=True),
        Binding("pageup", "page(-1)", "scroll up", priority=True),
        Binding("pagedown", "page(1)", "scroll down", priority=True),
        Binding("ctrl+up,alt+up", "focus_last", "to the messages"),
        Binding("ctrl+z", "app.suspend_process", "to the shell; fg comes back", priority=True),
    ]
    AUTO_FOCUS = "#input"

    app: ChatApp

    def __init__(self, model: str, conversation: Conversation):
        super().__init__()
        self.model = model
        self.conversation = conversation
        self.facts: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.ready = False
        self.trouble = ""  # why there is no model and none on its way
        self._load = (
            "",
            time.monotonic(),
            False,
        )  # what loading does, since when, whether that tells how far
        self._escaped = 0.0  # when esc was last pressed beside a load
        self.question: int | None = None  # a question that the engine has not got yet
        self.editing: int | None = None  # the user message that the composer's text will replace
        self._turn: Turn | None = None  # the answer in the making
        self.unheard = 0  # events of the engine that wait for their turn
        self._asked = 0.0
        self._first: tuple[float, int] | None = None
        self._progress: tuple[int, int, float] | None = None  # tokens read, of how many, when all will be
        self._read = 0  # tokens of the conversation before the answer
        self._tokens = 0
        self._painting = self._heard = False
        self._painted = self._cpu = 0.0
        self._stopping = False
        self._stopped = 0.0
        self._deaths: list[float] = []
        self._clock = None

    def compose(self) -> ComposeResult:
        with Row(), Column(id="main"):
            yield Transcript()
            yield Static(id="notice", markup=False)
            yield Composer(self._history)
            yield StatusLine()

    async def on_mount(self) -> None:
        self.status.tell(state="starting", model=self.model)
        await self.show_conversation()
        self.on_resize()

    def on_resize(self) -> None:
        """A narrow terminal shows one thing at a time."""
        self.set_class(self.app.size.width < NARROW, "narrow")

    # Pieces

    @cached_property
    def transcript(self) -> Transcript:
        """The messages."""
        return self.query_one(Transcript)

    @cached_property
    def composer(self) -> Composer:
        """Where the user writes."""
        return self.query_one(Composer)

    @cached_property
    def status(self) -> StatusLine:
        """The line at the bottom."""
        return self.query_one(StatusLine)

    @property
    def sidebar(self) -> Sidebar | None:
        """The list of chats, once it was opened."""
        return next(iter(self.query(Sidebar)), None)

    @property
    def answering(self) -> bool:
        """Whether an answer is being made or waited for."""
        return self.conversation.answer is not None

    def say(self, text: str, error: bool = False) -> None:
        """A line above the composer; empty takes it away."""
        notice = self.query_one("#notice", Static)
        notice.update(clean(text))
        notice.set_class(error, "error")
        notice.display = bool(text)

    def complain(self, e: TinychatError) -> None:
        """Say what is wrong and what to do."""
        self.say(f"{e.what} {e.todo}", error=True)

    def refill(self) -> None:
        """Show the list of chats as it is now, if it is open."""
        if self.sidebar is not None and self.sidebar.display:
            self.sidebar.current = self.conversation.chat.id
            self.sidebar.fill()

    def _history(self) -> list[str]:
        try:
            return self.app.store.said()
        except TinychatError:  # it is said where it matters
            return []

    async def show_conversation(self) -> None:
        """The present branch, or a welcome."""
        tree = self.conversation.tree
        branch = [(i, tree.nodes[i], siblings) for i, siblings in tree.branches()]
        await self.query("#welcome").remove()
        if not branch:
            await self.transcript.mount(Static(WELCOME, id="welcome", markup=False), before=0)
        await self.transcript.show(branch)
        last = self.conversation.last("assistant")
        self.status.tell(used=self.conversation.tokens_used(), **status_of(last))

    async def open(self, conversation: Conversation) -> None:
        """Another conversation."""
        self.conversation.close()
        self.conversation = conversation
        self.editing = self.question = None
        self.say("")
        await self.show_conversation()
        self.refill()
        self.composer.input.focus()

    # Saying something

    async def on_submitted(self, message: messages.Submitted) -> None:
        """Enter: a command, a new message, or an edited one."""
        if command := commands.split(message.text):
            self.composer.clear()
            self.say("")
            await self.run_command(*command)
            return
        if self.answering:
            self.say("Still answering: esc stops it.")
            return
        words = Words(message.text, message.attachments)
        if self.ready and words.may_exceed(self.context):
            self.run_worker(self.weigh(words, self.send), group="weigh", exclusive=True)
        else:
            await self.send(words)

    async def send(self, words: Words) -> None:
        """Say it, as a new message or in place of the one that is edited, and have it answered."""
        tree = self.conversation.tree
        parent = tree.leaf
        if self.editing is not None:
            parent = tree.nodes[self.editing].parent
        elif parent is not None and tree.nodes[parent].role == "user":
            parent = tree.nodes[parent].parent  # it never got an answer: say it anew beside it
        question = self.conversation.ask(words.text, parent, words.attachments)
        self.editing = None
        self.composer.clear()
        self.say("")
        await self.answer(question)

    @property
    def context(self) -> int:
        """Tokens that the model can read; 0 while unknown."""
        return self.facts.get("ctx") or 0

    async def weigh(
        self,
        words: Words,
        send: Callable[[Words], Awaitable[None]],
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """Send words that may have more tokens than the context; if they do, ask before: all of them, the
        first ones, none.
        """
        self.say("Counting its tokens…")
        tokens = None
        with suppress(asyncio.TimeoutError):
            tokens = await asyncio.wait_for(self.app.engine.count(words.as_read), PATIENCE)
        self.say("")
        if self.answering and self.question is None:
            return  # something else was said meanwhile
        if tokens is None or tokens + MARGIN <= self.context:
            await send(words)
            return
        room = self.context * 3 // 4  # an answer, and what was said before, need some, too

        async def decided(choice: str | None) -> None:
            if choice == "first":
                await send(await words.beginning(room, self.app.engine))
            elif choice == "all":
                await send(words)
            else:
                leave()

        rate = next(
            (r for m in reversed(self.conversation.path()) if (r := m.stats.get("prefill_tps"))), None
        )
        evicts = self.app.options.get("kv_policy") != "none"
        self.app.push_screen(TooLargeScreen(tokens, self.context, room, rate, evicts), decided)

    async def answer(self, question: int) -> None:
        """Have a question answered, as a new branch if it was before."""
        node = self.conversation.begin_answer(question, self.model)
        await self.show_conversation()
        turn = self._turn = self.transcript.turn(node)
        turn.running = {}
        self.question, self._first, self._tokens, self._stopping = question, None, 0, False
        self._asked = time.monotonic()
        self._watch()
        if self.ready:
            self._ask()
        elif self.trouble:
            self.lack_model(self.trouble)
        self.refill()

    def _ask(self) -> None:
        c = self.conversation
        params = {**c.chat.params}
        if params.get("seed") is not None and self._turn is not None:
            params["seed"] += len(self._turn.branches) - 1  # the same seed would say the same again
        self._asked, self._progress = time.monotonic(), None
        self.app.engine.answer(c.key, c.request(self.question, self.model), c.chat.system, params)
        self.question = None

    def _watch(self) -> None:
        """Say what the answer is waiting for, now and twice a second."""
        if self._clock is None:
            self._clock = self.set_interval(TICK, self._tick)
        self._tick()

    def _tick(self) -> None:
        turn = self._turn
        if turn is None or not self.answering:
            if self._clock is not None:
                self._clock.stop()
                self._clock = None
            return
        waited = time.monotonic() - self._asked
        if self._stopping:
            state = "stopping"
        elif self.trouble:
            state = "no model"
        elif not self.ready:
            state = "loading"
        elif self._first is None:
            state = "reading"
        else:
            state = "answering"
        text = ""
        if state == "loading":
            text = "waiting for the model"
        elif state == "no model":
            text = "waiting for a model: ctrl+o chooses one, esc leaves it"
        elif state == "stopping" and time.monotonic() - self._stopped > 1:
            text = "stopping; esc again ends the engine and starts another"
        elif state == "reading" and self._progress is not None:
            tokens, total, left = self._progress
            left = duration(max(1.0, left - time.monotonic()))
            text = f"reading the prompt: {tokens:,} of {total:,} tokens, {left} left"
        elif state == "reading" and waited > 0.2:
            text = f"reading the prompt, {waited:.0f} s"
        if turn.waiting != text:
            turn.waiting = text
            turn.changed()
        if self._first is not None:
            began, n = self._first
            took = time.monotonic() - began
            rate = (self._tokens - n) / took if took > 0.3 and self._tokens > n else None
            turn.running = {"tokens": self._tokens, "rate": rate}
            used = self._read + self._tokens
            self.status.tell(rate=rate, ttft=self._first[0] - self._asked, used=used)
        if state != "loading":  # which tells how far it is
            self.status.tell(state=state)

    # Opening a stored chat

    async def on_open_chat(self, message: messages.OpenChat) -> None:
        """From the sidebar."""
        if message.chat_id == self.conversation.chat.id:
            self.composer.input.focus()
            return
        if self.answering:
            self.say("Still answering: esc stops it.")
            return
        try:
            conversation = Conversation.open(self.app.store, message.chat_id)
        except TinychatError as e:
            self.complain(e)
            return
        finally:
            if self.has_class("narrow"):
                await self.action_toggle_sidebar()
        await self.open(conversation)

    def action_stop(self) -> None:
        """Esc: close the completions, leave editing, or stop the answer."""
        if self.composer.close_completion():
            return
        if self.answering:
            if self.question is not None:  # the engine never got it
                turn, self._turn = self._turn, None
                self._settle(turn, self.conversation.give_up("cancelled"))
                return
            if self._stopping:
                self.run_worker(self._replace_engine())
                return
            self._stopping, self._stopped = True, time.monotonic()
            self.app.engine.cancel()
            self._tick()
        elif self.editing is not None:
            self.editing = None
            self.composer.clear()
            self.say("")
        elif not self.ready and not self.trouble:
            self._escape_loading()
        else:
            self.say("")
            self.composer.input.focus()

    async def _replace_engine(self) -> None:
        """The engine does not stop: end it and start another one, with the conversation as it is."""
        turn, self._turn = self._turn, None
        self.ready = False
        self._settle(turn, self.conversation.give_up("cancelled"))
        self.say("The engine did not stop; another one takes its place. What was said is kept.")
        self.status.tell(state="restarting", rate=None)
        await self.app.start_engine()

    def _escape_loading(self) -> None:
        now = time.monotonic()
        if now - self._escaped > 5:
            self.say("The model is on its way: esc again stops that.")
        else:
            self.lack_model(f"Loading {self.model} was stopped. /model chooses a model.")
            self.run_worker(self.app.engine.start())  # what it was doing ends with the process before
        self._escaped = now
