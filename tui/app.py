"""The application: owns the store, the engine's process and the settings; the screens do the rest."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from textual import events
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.screen import Screen
from textual.widget import MountError
from textual.widgets import TextArea

from tinychat.base import locations, remembered
from tinychat.base.errors import TinychatError
from tinychat.base.preferences import Preferences
from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.hub import reach
from tinychat.mcp.toolbox import Toolbox
from tinychat.process.address import split_name
from tinychat.process.client import EngineClient
from tinychat.process.protocol import ChatEngine, EngineEvent, Loading, Text
from tinychat.tui import keys, messages
from tinychat.tui.conversation import Conversation
from tinychat.tui.driver import TerminalDriver
from tinychat.tui.host import Host
from tinychat.tui.keys import Group, Keys
from tinychat.tui.output import Terminal, paintable
from tinychat.tui.screens.chat import ChatScreen
from tinychat.tui.theme import DARK, SHORT_NAMES, THEMES
from tinychat.tui.widgets.composer import Input
from tinychat.tui.widgets.sidebar import ChatList
from tinychat.tui.widgets.turn import Turn

POLL_SECONDS = 1.0  # how often memory and load are looked at while an answer runs
PATIENCE = 1.0  # seconds that the screen may stand still because another program holds the store's lock


class ChatApp(Host):
    """`conversation`: what to open with. `engine`: who answers; if nobody, what `command` starts."""

    TITLE = "tinychat"
    CSS_PATH = "screens/chat.tcss"  # the default screen loads none of its own
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "leave", priority=True, id="leave"),
        Binding(
            "ctrl+c", "copy_or_quit", "copy what is selected; twice: leave", priority=True, id="copy_or_leave"
        ),
        Binding("ctrl+p", "command_palette", "everything, by name", priority=True, id="palette"),
    ]

    def __init__(
        self,
        model: str,
        conversation: Conversation,
        *,
        options: dict[str, Any] | None = None,
        engine: ChatEngine | None = None,
        command: Sequence[str] | None = None,
        settings: Path | None = None,
        preferences: Preferences | None = None,
        toolbox: Toolbox | None = None,
    ):
        super().__init__()
        self.toolbox = toolbox or Toolbox()
        self.preferences = preferences or Preferences(locations.config_file())
        self.keys = keys_of(self.preferences)
        self.set_keymap(self.keys.keymap)
        self.model, self.conversation, self.options = model, conversation, dict(options or {})
        self.store = conversation.store
        self.store.patience = PATIENCE
        self.engine = engine or EngineClient(self._heard, command)
        self.engine.on_event = self._heard
        self.settings_path = settings or remembered.settings_file()
        self._pace: list[tuple[float, int]] = []
        self._interrupted = 0.0
        self._warned = False  # of what leaving would lose
        self._engine_process: Any = None  # of psutil
        self._was_busy = True  # when the machine was looked at last
        self._early: list[events.Event] | None = []  # keys from before there was a place for them
        for theme in THEMES:
            self.register_theme(theme)
        name = SHORT_NAMES.get(self.preferences.theme or "") or remembered.recall(self.settings_path).get(
            "theme"
        )
        self.theme = name if isinstance(name, str) and name in self.available_themes else DARK.name

    def get_default_screen(self) -> Screen:
        return ChatScreen(self.model, self.conversation)

    @property
    def chat(self) -> ChatScreen:
        """The screen under everything."""
        chat = self.screen_stack[0]
        assert isinstance(chat, ChatScreen)
        return chat

    def on_mount(self) -> None:
        """Paint first; everything else comes after."""
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        self.call_after_refresh(self._begin)

    async def on_event(self, event: events.Event) -> None:
        if self._early is not None and isinstance(event, (events.Key, events.Paste)):
            self._early.append(event)
        else:
            await super().on_event(event)

    async def _type_early_keys(self) -> None:
        """Type what was typed while the program started. An enter may have come as a line feed then."""
        early, self._early = self._early or [], None
        for event in early:
            if isinstance(event, events.Key) and event.key == "ctrl+j":
                event = events.Key("enter", "\r")
            await super().on_event(event)

    async def _begin(self) -> None:
        # What is loaded stays: the collector need not look at it again, in the middle of an answer.
        gc.freeze()
        gc.set_threshold(1000, 10, 50)
        self.chat.composer.input.focus()
        self.call_later(self._type_early_keys)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            with suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self._told_to_end)
        if self.store.notice:
            self.chat.say(self.store.notice, error=True)
        await self.start_engine()
        self.toolbox.start()
        self.run_worker(self._warm_up, thread=True, group="warm")
        self.set_interval(POLL_SECONDS, self._look_at_machine)
        self.set_interval(POLL_SECONDS, self._look_at_store)

    def _warm_up(self) -> None:
        from tinychat.tui import markdown

        markdown.warm_up()
        if not self.store.in_memory:
            # Wiping may take a while: over a connection of its own, so that nobody waits for it.
            with suppress(TinychatError):
                store = ChatStore(self.store.path)
                store.purge()
                store.close()

    def _told_to_end(self) -> None:
        with suppress(Exception):
            self.chat.conversation.flush()
        self.exit()

    async def on_unmount(self) -> None:
        """Store what was said, end the engine."""
        with suppress(Exception):
            self.chat.conversation.flush()
        await asyncio.gather(self.engine.close(), asyncio.to_thread(self.toolbox.close))

    def run_to_end(self) -> int:
        """Run until the user leaves; the exit code. Raises what went wrong, if something did."""
        before = sys.__stderr__
        sys.__stderr__ = Terminal(paintable())  # type: ignore[misc, assignment]  # where Textual paints
        try:
            self.run()
        finally:
            sys.__stderr__ = before  # type: ignore[misc]
            if lost := self.store.loss():
                print(lost, file=sys.stderr)
            self.store.close()
        if self._exception is not None:
            raise getattr(self._exception, "error", self._exception)  # a worker's, without what is around it
        return self.return_code or 0

    def get_driver_class(self) -> type[Driver]:
        return TerminalDriver

    def name_window(self, title: str) -> None:
        if isinstance(self._driver, TerminalDriver):
            self._driver.show_title(title)

    def _handle_exception(self, error: Exception) -> None:
        """End the program. Textual prints a page with everything that was said; two lines come later."""
        if self._exit and isinstance(getattr(error, "error", error), MountError):
            return  # what came behind the key that leaves is shown nowhere any more
        self._return_code = 1
        if self._exception is None:
            self._exception = error
            self._exception_event.set()
        self._close_messages_no_wait()

    # The engine

    def _heard(self, event: EngineEvent) -> None:
        if not self.screen_stack:
            return
        # Text comes many times a second; what it need not pass through is cheaper left out.
        if isinstance(event, Text) and not self.chat.unheard:
            self.guarded(self.chat.hear, event)
        else:
            self.chat.unheard += 1
            self.chat.post_message(messages.Engine(event))

    def guarded(self, call: Callable[..., None], *args: Any) -> None:
        """Outside of Textual's messages: what goes wrong ends the program as it would inside them."""
        try:
            call(*args)
        except Exception as e:

            def fail(error: Exception = e) -> None:
                raise error

            self.call_next(fail)

    async def start_engine(self) -> None:
        """A new process in place of the present one, and the model into it."""
        await self.load_model(self.chat.model, afresh=True)
        if not self.chat.model:
            self.chat.begin_without_model()

    async def load_model(self, name: str, afresh: bool = False) -> None:
        """Into the present process, or a new one if that is gone."""
        self._pace = []
        try:
            if afresh or self.engine.pid is None:
                await self.engine.start()
        except TinychatError as e:
            self.chat.lack_model(f"{e.what} {e.todo}")
            return
        if not name:
            return
        self.remember_model(name, loads=True)
        self.engine.load(name, {**self.preferences.of(name).load, **self.options})

    def download_pace(self, event: Loading) -> tuple[float, float]:
        """Bytes a second over the last few seconds, and seconds that are left; 0 while unknown."""
        now = time.monotonic()
        if self._pace and event.done < self._pace[-1][1]:
            self._pace = []
        self._pace = [(t, n) for t, n in self._pace if now - t < 5] + [(now, event.done)]
        (t0, n0) = self._pace[0]
        rate = (event.done - n0) / (now - t0) if now - t0 > 0.5 else 0.0
        return rate, (event.total - event.done) / rate if rate > 0 else 0.0

    def _look_at_machine(self) -> None:
        """Memory of the engine, and how busy the cores are; nothing while nothing happens."""
        if not self.screen_stack:  # the program is ending
            return
        chat = self.chat
        chat.show_loading()
        if news := self.toolbox.news():
            chat.say(news, error=True)
        busy, was_busy = chat.answering or not (chat.ready or chat.trouble), self._was_busy
        self._was_busy = busy
        if self.engine.pid is None or chat.facts.get("server") or not (busy or was_busy):
            chat.status.tell(cpu=None)
            return
        import psutil

        with suppress(psutil.Error):
            if self._engine_process is None or self._engine_process.pid != self.engine.pid:
                self._engine_process = psutil.Process(self.engine.pid)
            chat.status.tell(memory=self._engine_process.memory_info().rss)
        chat.status.tell(cpu=psutil.cpu_percent() if busy else None)

    # What could not be stored

    def _look_at_store(self) -> None:
        """Say once that storing fails, and once that it works again."""
        if not self.screen_stack:
            return
        for held in {self.chat.conversation.held, *self.store.unsaved}:
            if news := held.news():
                self._warned = False
                self.chat.say(news, error=held.problem is not None)
        self.chat.status.tell(unsaved=bool(self.store.unsaved))

    def leave(self, code: int = 0) -> None:
        """End; not at once if something would be lost."""
        lost = self.store.loss()
        if lost and not self._warned:
            self._warned = True
            self.chat.say(f"{lost} Leave again to lose it; /save FILE keeps it elsewhere.", error=True)
            return
        self.exit(return_code=code)

    async def action_quit(self) -> None:
        """ctrl+q."""
        self.leave()

    # Settings

    def _keep_theme(self, theme: Any) -> None:
        remembered.remember(self.settings_path, theme=theme.name)

    def remember_model(self, name: str, loads: bool = False) -> None:
        if not self.store.in_memory and split_name(name)[1] is None:
            reach.remember_model(name, loads, self.settings_path)

    # Keys

    def action_copy_or_quit(self) -> None:
        """ctrl+c: copy the selection, else say how to leave; twice leaves."""
        from tinychat.tui import clipboard

        if text := self.screen.get_selected_text() or getattr(self.focused, "selected_text", ""):
            clipboard.copy(self, text)
            self.screen.clear_selection()
            self.chat.say("Copied.")
            return
        now = time.monotonic()
        if now - self._interrupted < 2:
            self.leave(130)
            return
        self._interrupted = now
        if self.chat.answering:
            self.chat.action_stop()
        self.chat.say(f"{self.keys.named('copy_or_leave')} again to leave (also {self.keys.named('leave')}).")

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        from tinychat.tui.commands import COMMANDS

        for c in COMMANDS:
            if not c.needs_argument:
                yield SystemCommand(c.name, c.help, lambda name=c.name: self._run(name))
        for theme in THEMES:
            yield SystemCommand(
                f"theme {theme.name}", "colours", lambda name=theme.name: setattr(self, "theme", name)
            )

    def _run(self, name: str) -> None:
        self.chat.run_worker(self.chat.run_command(name, ""))

    def ask_text(self, question: str, value: str, then: Callable[[str], None]) -> None:
        """Ask for a line of text; `then` gets it."""
        from tinychat.tui.screens.prompt import PromptScreen

        def done(answer: str | None) -> None:
            if answer:
                try:
                    then(answer)
                except TinychatError as e:
                    self.chat.complain(e)

        self.push_screen(PromptScreen(question, value), done)

    def ask_path(self, question: str, then: Callable[[Path], None]) -> None:
        """Ask for the name of a file to write."""
        self.ask_text(question, "", lambda answer: then(locations.written(answer)))


def keys_of(preferences: Preferences) -> Keys:
    """The keys as config.toml has them. Raises UsageError, which names the line."""
    groups = [
        Group.of(Input.BINDING_GROUP_TITLE, Input.BINDINGS, written=True),
        Group.of(
            ChatScreen.BINDING_GROUP_TITLE,
            ChatScreen.BINDINGS,
            ChatApp.BINDINGS,
            written=True,
            everywhere=True,
        ),
        Group.of(Turn.BINDING_GROUP_TITLE, Turn.BINDINGS),
        Group.of(ChatList.BINDING_GROUP_TITLE, ChatList.BINDINGS),
    ]
    own = {
        key: b.description
        for b in TextArea.BINDINGS
        if isinstance(b, Binding)
        for key in b.key.split(",")
        if key.startswith("ctrl")
    }
    return keys.made(groups, preferences.keys, preferences.vi, own, preferences.wrong_key)


def make_app(
    model: str,
    store: ChatStore,
    chat: Chat | None = None,
    system: str | None = None,
    params: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    command: Sequence[str] | None = None,
    engine: ChatEngine | None = None,
    preferences: Preferences | None = None,
    toolbox: Toolbox | None = None,
) -> ChatApp:
    """The chat screen, with a stored chat or a new one; without a model's name it asks for one.

    system and params hold in place of the stored chat's own. options are those of `tinychat.load`; engine
    answers, or what command starts (default: `tinychat.process.worker`). preferences: what holds where
    options say nothing. Raises ChatLockedError.
    """
    if chat is None:
        conversation = Conversation(store, model, system, params)
    else:
        conversation = Conversation.open(store, chat.id)
        conversation.chat.model = model
        conversation.chat.params |= params or {}
        conversation.chat.system = system or conversation.chat.system
    return ChatApp(
        model,
        conversation,
        options=options,
        command=command,
        engine=engine,
        preferences=preferences,
        toolbox=toolbox,
    )
