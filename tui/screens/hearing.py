"""Events of the engine, and what becomes of them on the chat screen."""

from __future__ import annotations

import asyncio
import time

from tinychat.base.events import Notice, Reading
from tinychat.process.protocol import Began, Calling, Died, Failed, Finished, Loaded, Loading, Text
from tinychat.tui import messages
from tinychat.tui.screens.answering import Answering
from tinychat.tui.text import clean
from tinychat.tui.widgets.turn import human_size, seconds
from tinychat.tui.words import Words

FRAME = 0.08  # seconds between two paintings of a running answer, at least
SLOWEST = 0.4  # at most
SHARE = 0.03  # of one core's time, at most, goes into painting a running answer
RESTARTS = 3  # deaths of the engine within a minute after which it is left alone


class Hearing(Answering):
    """Takes the engine's events, in their order."""

    async def on_engine(self, message: messages.Engine) -> None:
        """Its events, in order."""
        event = message.event
        self.unheard -= 1
        if isinstance(event, Text):
            self.hear(event)
        elif isinstance(event, Reading):
            left = (event.total - event.tokens) / max(event.rate, 1e-9)
            self._progress = (event.tokens, event.total, time.monotonic() + left)
            self._tick()
        elif isinstance(event, Began):
            if self._turn is not None:
                self._turn.prompt_text = event.prompt_text
                self._first = (time.monotonic(), 1)
                self._read = event.prompt_tokens
                self._turn.waiting = ""
        elif isinstance(event, Calling):
            self._writes_call = clean(event.name)
            self._tick()
        elif isinstance(event, Finished):
            await self._finished(event)
        elif isinstance(event, Loading):
            self._loading(event)
        elif isinstance(event, Loaded):
            self._loaded(event)
        elif isinstance(event, Notice):
            self.say(event.message)
        elif isinstance(event, Failed):
            await self._failed(event)
        elif isinstance(event, Died):
            await self._died(event)

    def hear(self, event: Text) -> None:
        """More of the answer."""
        if self._turn is None or not self.answering:
            return
        self._tokens = event.tokens
        self.conversation.hear(event.text, self._not_kept)
        turn = self._turn
        if event.thought is not None or turn.thinking:
            turn.thought_tokens = event.thought or event.tokens
        self._heard = True
        if not self._painting:
            self._painting = True
            self._paint()

    def _not_kept(self, e: BaseException) -> None:
        """Storing, in its own thread, has met a mistake of ours: it ends the program as it would here."""

        def fail() -> None:
            raise e

        self.app.call_from_thread(self.app.guarded, fail)

    def _paint(self) -> None:
        """Show what has come, then leave the machine to the engine for a while."""
        turn = self._turn
        if turn is None:
            self._painting = False
            return
        self._heard = False
        self._painted, self._cpu = time.monotonic(), time.thread_time()
        if turn.running is not None:
            turn.running["tokens"] = self._tokens
        turn.update()
        self._painting = True
        self._come_back(FRAME)

    def _come_back(self, seconds: float) -> None:
        # The loop's own timer: Textual's cost a task and a message each, as much as a line of text.
        asyncio.get_running_loop().call_later(seconds, self.app.guarded, self._paint_if_new)

    def _paint_if_new(self) -> None:
        if not self.is_attached:
            return
        turn = self._turn
        # All that this thread did since then counts: layout, painting, keys.
        wait = min(SLOWEST, (time.thread_time() - self._cpu) / SHARE) - (time.monotonic() - self._painted)
        if turn is not None and wait > 0.01:
            self._come_back(wait)
            return
        self._painting = False
        if self._heard:
            self._paint()

    async def _finished(self, event: Finished) -> None:
        turn, self._turn = self._turn, None
        if not self.answering:
            return
        self._settle(turn, self.conversation.finish(event.message))
        if event.message.finish_reason == "context_full":
            self.say(
                f"The context of {self.facts.get('ctx')} tokens is full: /compact makes room.", error=True
            )
        if self.composer.queue.words and event.message.finish_reason in ("stop", "length"):
            await self.say_words(self.composer.queue.take(0))

    def show_loading(self) -> None:
        """How long a load that does not tell how far it is has taken."""
        what, since, counts = self._load
        waited = time.monotonic() - since
        if not (self.ready or self.trouble or counts) and what and waited > 3:
            self.status.tell(state=f"{what}, {waited:.0f} s")

    def _loading(self, event: Loading) -> None:
        text = event.what
        if self.ready or self.trouble:
            return  # said before another decision
        if text != self._load[0]:
            self._load = (text, time.monotonic(), bool(event.total))
        if event.total:
            text += f" {human_size(event.done)} of {human_size(event.total)}"
            rate, left = self.app.download_pace(event)
            if rate:
                text += (
                    f", {human_size(rate)}/s, {seconds(left)} left"
                    if left >= 1
                    else f", {human_size(rate)}/s"
                )
        self.show_download(text, event.done, event.total)
        self.status.tell(state=text)

    def _loaded(self, event: Loaded) -> None:
        name = event.facts.get("model", self.model)
        if (event.asked or name) != self.model:
            return  # another one was chosen meanwhile, and is next
        if name != self.model:
            self.call_model(name)
        self.ready, self.facts, self.defaults = True, event.facts, event.sampling
        self.trouble, self.first = "", False
        self.app.remember_model(self.model)
        self.show_download("", 0, 0)
        self.takes_tools = event.takes_tools
        f = event.facts
        self.status.tell(
            state="ready", model=self.model, backend=f.get("backend"), isa=f.get("isa"), ctx=f.get("ctx")
        )
        if not event.has_template:
            self.say("This model has no chat template: it continues your text instead of answering.")
        self.status.tell(evicts=f.get("evicts"))
        self.tell_room()
        self.post_message(messages.Attached())
        if self.question is None:
            return
        asked = self.conversation.tree.nodes[self.question]
        words = Words(asked.content, asked.attachments)
        if asked.role == "user" and words.may_exceed(self.context):
            self.run_worker(self.weigh(words, self._ask_again, self.action_stop), group="weigh")
        else:
            self._ask()
            self._tick()

    async def _ask_again(self, words: Words) -> None:
        """The question that waited for the model, as it is or a part of it in its place."""
        if self.question is None:
            return
        asked = self.conversation.tree.nodes[self.question]
        if words.as_read == asked.as_read():
            self._ask()
            self._tick()
            return
        turn, self._turn = self._turn, None
        self._settle(turn, self.conversation.give_up("cancelled"))
        await self.answer(self.conversation.ask(words.text, asked.parent, words.attachments))

    async def _failed(self, event: Failed) -> None:
        if event.during == "load":
            self.lack_model(f"{event.what} {event.todo}")
            return
        self.say(f"{event.what} {event.todo}", error=True)
        turn, self._turn = self._turn, None
        self._settle(turn, self.conversation.give_up())

    async def _died(self, event: Died) -> None:
        """The engine is gone: keep what it said, say why, start another one."""
        self.ready = False
        turn, self._turn = self._turn, None
        if self.question is None:
            self._settle(turn, self.conversation.give_up())
        else:
            self._turn = turn  # it never heard the question: the next one will
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < 60] + [now]
        if len(self._deaths) > RESTARTS:
            self.lack_model(f"The engine failed again: {event.reason}. /model starts it once more.")
            return
        self.say(f"The engine failed: {event.reason}. Restarting it; what was said is kept.", error=True)
        self.status.tell(state="restarting", rate=None)
        await self.app.start_engine()
