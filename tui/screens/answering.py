"""An answer from its question to its end: sent, waited for, stopped; and the model that gives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tinychat.conversation import Message
from tinychat.tui.screens.parts import status_of
from tinychat.tui.screens.room import MARGIN, Room
from tinychat.tui.screens.too_large import TooLargeScreen
from tinychat.tui.widgets.turn import Turn, duration
from tinychat.tui.words import Words

NONE_YET = "No model is chosen yet."
TICK = 0.5  # seconds between two looks at what is shown beside the text
LONG = 10.0  # seconds of an answer after which a terminal that nobody looks at rings its bell
PATIENCE = 10.0  # seconds that an engine may take to count tokens


class Answering(Room):
    """One answer at a time."""

    # Saying something

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
        if not words.waited:
            self.composer.clear()
        self.say("")
        await self.answer(question)

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
        evicts = bool(self.facts.get("evicts", True)) and self.app.options.get("kv_policy") != "none"
        self.app.push_screen(TooLargeScreen(tokens, self.context, room, rate, evicts), decided)

    async def answer(self, question: int) -> None:
        """Have a question answered, as a new branch if it was before."""
        node = self.conversation.begin_answer(question, self.model)
        await self.show_conversation()
        self._begin(node, question)

    def go_on(self, answer: int) -> None:
        """Have an answer go on that was stopped or cut."""
        self.conversation.begin_more(answer)
        self._begin(answer, answer)
        if self._turn is not None:
            self._turn.reopen()
            self._turn.update()

    def _begin(self, node: int, question: int) -> None:
        """Ask the engine for the answer at `node`; question: where the path ends that it hears."""
        self._turn = self.transcript.turn(node)
        if self._turn is not None:
            self._turn.running = {}
        self.question, self._first, self._tokens, self._stopping = question, None, 0, False
        self._asked = self._wanted = time.monotonic()
        self._watch()
        if self.ready:
            self._ask()
        elif self.trouble:
            self.lack_model(self.trouble)
        self.refill()
        self.name_window()

    def _ask(self) -> None:
        c, question = self.conversation, self.question
        self._held = question is not None and self.takes_tools and bool(self.app.toolbox.waits_for)
        if question is None or self._held:
            return
        tools = self.app.toolbox.offered() if self.takes_tools else []
        self._writes_call = ""
        params, self.once = {**c.chat.params, **self.once}, {}
        if params.get("seed") is not None and self._turn is not None:
            params["seed"] += self._turn.branches.index(self._turn.node)  # the same would say the same again
        self._asked, self._progress = time.monotonic(), None
        self.app.engine.answer(c.key, c.request(question, self.model), c.chat.system, params, tools)
        self.question = None

    async def say_words(self, words: Words) -> None:
        """Send words; above, it is made sure that the model can read them."""
        raise NotImplementedError

    # Waiting for it

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
        if self._held:
            self._ask()
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
        if self._held:
            text = f"waiting for MCP servers: {', '.join(self.app.toolbox.waits_for)}"
        elif self._writes_call and state == "answering":
            text = f"calls {self._writes_call}"
        elif state == "loading":
            text = "waiting for the model"
        elif state == "no model":
            text = f"waiting for a model: {self.key('model')} chooses one, {self.key('stop')} leaves it"
        elif state == "stopping" and time.monotonic() - self._stopped > 1:
            text = "stopping; esc again ends the engine and starts another"
        elif state == "reading" and self._progress is not None:
            tokens, total, done = self._progress
            left = duration(max(1.0, done - time.monotonic()))
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

    def _settle(self, turn: Turn | None, m: Message | None) -> None:
        """An answer has ended, one way or another."""
        self._stopping, self.question, self._held = False, None, False
        if m is not None and m.finish_reason not in ("stop", "length", "tool_calls"):
            self.composer.take_back()  # nothing that waits is said after a stop or a failure
        if turn is not None and m is not None:
            turn.message, turn.running, turn.waiting = m, None, ""
            turn.prompt_text = m.prompt_text or turn.prompt_text
            turn.thought_tokens = m.stats.get("reasoning_tokens") or turn.thought_tokens
            turn.thinking = False
            turn.update()
        self.status.tell(
            state="ready" if self.ready else "no model" if self.trouble else "loading",
            **status_of(m),
        )
        self.tell_room()
        self.refill()
        self.name_window()
        if not self.app.app_focus and time.monotonic() - self._wanted > LONG:
            self.app.bell()  # somebody waits for it elsewhere

    # Stopping it

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

    def action_end_thought(self) -> None:
        """F4: enough thought, the answer is wanted."""
        if self.answering and self._turn is not None and self._turn.thinking:
            self.app.engine.end_thought()
        else:
            self.say("Nobody is thinking.")

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

    # The model

    def lack_model(self, reason: str) -> None:
        """There is no model, and a question that waits needs one: choose it."""
        self.ready, self.trouble = False, reason
        self.say(reason, error=True)
        self.status.tell(state="no model", rate=None)
        if self.question is not None:
            self._tick()
        if self.app.screen is self and self.first:
            self.begin_without_model(reason)
        elif self.app.screen is self and self.question is not None:
            self.action_model()

    def begin_without_model(self, trouble: str = "") -> None:
        """None is here yet: offer some; again where the one that was chosen did not come (trouble)."""
        from tinychat.tui.screens.first import OTHER, FirstScreen

        def done(name: str | None) -> None:
            if name == OTHER:
                self.action_model()
            elif name:
                self.run_worker(self.choose_model(name))
            elif not self.model:
                self.say(f"No model yet: {self.key('model')} chooses one.")

        self.first, self.trouble = True, trouble or NONE_YET
        self.status.tell(state="no model")
        self.app.push_screen(FirstScreen(trouble, self.model), done)

    def action_model(self) -> None:
        """ctrl+o."""
        from tinychat.tui.screens.models import ModelScreen

        def done(name: str | None) -> None:
            if name:
                self.run_worker(self.choose_model(name))

        trouble = "" if self.trouble == NONE_YET else self.trouble
        self.app.push_screen(ModelScreen(self.model, trouble), done)

    async def choose_model(self, name: str) -> None:
        """Load another model; the conversation goes on with it."""
        if self.answering and self.question is None:
            self.say(f"Still answering: {self.key('stop')} stops it.")
            return
        busy = not self.ready and not self.trouble  # with another model: that process is ended
        self.ready, self.trouble, self._deaths = False, "", []
        self._load = ("", time.monotonic(), False)
        self.call_model(name)
        self.status.tell(state="loading", model=name, backend=None, isa=None)
        self.say("")
        await self.app.load_model(name, afresh=busy)

    def call_model(self, name: str) -> None:
        """Call the model so, in the chat and the answer that waits for it."""
        self.model = self.conversation.chat.model = name
        if self.conversation.answer is not None:
            self.conversation.tree.nodes[self.conversation.answer].model = name
        self.conversation.keep(self.conversation.answer)
