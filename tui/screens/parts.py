"""Pieces of the chat screen, and what it knows of the conversation, the model and the running answer."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static

from tinychat.base.errors import TinychatError
from tinychat.conversation import Message
from tinychat.process.address import split_name
from tinychat.tui import messages
from tinychat.tui.conversation import Conversation
from tinychat.tui.hints import Hints
from tinychat.tui.host import Host
from tinychat.tui.text import clean
from tinychat.tui.widgets.composer import Composer
from tinychat.tui.widgets.heading import Heading
from tinychat.tui.widgets.sidebar import Sidebar
from tinychat.tui.widgets.status import StatusLine
from tinychat.tui.widgets.surface import Surface
from tinychat.tui.widgets.transcript import Transcript
from tinychat.tui.widgets.turn import Turn

HINTS = (  # keys by name, and what they do; or a sign that begins something
    ("send", "send"),
    ("newline", "new line"),
    ("/", "commands"),
    ("@file", "attach"),
    ("stop", "stop"),
    ("chats", "chats"),
    ("palette", "everything else"),
    ("help", "keys"),
    ("leave", "leave"),
)


BAR = 36  # cells of a bar
KEPT_PART = "esc twice stops it; what is here is kept, and it goes on the next time."


class ChatParts(Surface, Screen[None]):
    """The lowest floor of the chat screen: `answering`, `hearing` and `actions` follow above it."""

    app: Host

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
        self.first = False  # no model has been here yet
        self._escaped = 0.0  # when esc was last pressed beside a load
        self.question: int | None = None  # a question that the engine has not got yet
        self.once: dict[str, Any] = {}  # sampling parameters of the next answer alone
        self.editing: int | None = None  # the user message that the composer's text will replace
        self.takes_tools = False  # whether the model can be told of some
        self._held = False  # whether the question waits for tools
        self._writes_call = ""  # the tool that the answer is about to call
        self._turn: Turn | None = None  # the answer in the making
        self.unheard = 0  # events of the engine that wait for their turn
        self._asked = 0.0  # when the engine was asked
        self._wanted = 0.0  # when the user asked
        self._first: tuple[float, int] | None = None
        self._progress: tuple[int, int, float] | None = None  # tokens read, of how many, when all will be
        self._read = 0  # tokens of the conversation before the answer
        self._tokens = 0
        self._painting = self._heard = False
        self._painted = self._cpu = 0.0
        self._stopping = False
        self._stopped = 0.0
        self._deaths: list[float] = []
        self._clock: Timer | None = None

    # Pieces

    @cached_property
    def transcript(self) -> Transcript:
        """The messages."""
        return self.query_one(Transcript)

    @cached_property
    def composer(self) -> Composer:
        """The widget in which the user writes."""
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

    @property
    def context(self) -> int:
        """Tokens that the model can read; 0 while unknown."""
        return self.facts.get("ctx") or 0

    def key(self, name: str) -> str:
        """The key of that name, for a hint."""
        return self.app.keys.named(name)

    def say(self, text: str, error: bool = False) -> None:
        """A line above the composer; empty takes it away."""
        notice = self.query_one("#notice", Static)
        notice.update(clean(text))
        notice.set_class(error, "error")
        notice.display = bool(text)

    def name_window(self) -> None:
        """The chat's title, and whether it is being answered, where a terminal shows the name of a window."""
        title = "" if self.app.store.in_memory else self.conversation.chat.title  # terminals may keep it
        self.app.name_window(f"{'● ' if self.answering else ''}{title + ' · ' if title else ''}tinychat")

    def complain(self, e: TinychatError) -> None:
        """Say what is wrong and what to do."""
        self.say(f"{e.what} {e.todo}", error=True)

    def on_trouble(self, message: messages.Trouble) -> None:
        """From a widget."""
        self.complain(message.error)

    def refill(self) -> None:
        """Show the list of chats as it is now, if it is open."""
        if self.sidebar is not None and self.sidebar.display:
            self.sidebar.current = self.conversation.chat.id
            self.sidebar.fill()

    async def show_conversation(self) -> None:
        """The present branch, or a welcome."""
        tree = self.conversation.tree
        branch = [(i, tree.nodes[i], siblings) for i, siblings in tree.branches()]
        await self.query("#welcome, #download").remove()
        if not branch:
            await self.transcript.mount(self._welcome(), before=0)
        await self.transcript.show(branch)
        await self.name_chat()
        last = self.conversation.last("assistant")
        self.status.tell(used=self.conversation.tokens_used(), **status_of(last))

    async def name_chat(self) -> None:
        """The title and the system prompt, where they are shown."""
        self.name_window()
        heading = next(iter(self.transcript.query(Heading)), None)
        chat = self.conversation.chat
        if heading is None and (chat.title or chat.system):
            heading = Heading()
            await self.transcript.mount(heading, before=0)
        if heading is not None:
            heading.show(chat, self.conversation.tree)

    def _welcome(self) -> Hints:
        server = split_name(self.model)[1]
        where = "Everything you say is kept on this machine."
        if server is not None:
            where = f"What you say goes to {server.place}; the chat is kept on this machine."
        keys = self.app.keys
        hints = [f"{keys.named(key) if key in keys.names() else key} {does}" for key, does in HINTS]
        return Hints(hints, f"Ask something. {where}", id="welcome")

    def show_download(self, what: str, done: int, total: int) -> None:
        """How far a download is, under the welcome while that is there; no total takes it away."""
        shown = next(iter(self.query("#download").results(Static)), None)
        welcome = next(iter(self.query("#welcome")), None)
        if not total or welcome is None:
            if shown is not None:
                shown.remove()
            return
        n = min(BAR, done * BAR // total)
        text = f"{what}\n{'█' * n}{'░' * (BAR - n)} {done * 100 // total} %\n{KEPT_PART}"
        if shown is None:
            self.transcript.mount(Static(text, id="download", markup=False), after=welcome)
        else:
            shown.update(text)

    async def open(self, conversation: Conversation) -> None:
        """Another conversation."""
        self.conversation.close()
        self.conversation = conversation
        self.editing = self.question = None
        self.composer.take_back()
        self.say("")
        await self.show_conversation()
        self.refill()
        self.composer.input.focus()


def status_of(m: Message | None) -> dict[str, Any]:
    """Numbers of an answer for the status line."""
    s = m.stats if m is not None else {}
    drafted = s.get("drafted_tokens")
    return {
        "rate": s.get("decode_tps") or None,
        "ttft": s.get("ttft_s") or None,
        "kv_bytes": s.get("kv_bytes") or None,
        "evicted": s.get("evicted_tokens") or None,
        "accepted": s.get("accepted_tokens", 0) / drafted if drafted else None,
    }
