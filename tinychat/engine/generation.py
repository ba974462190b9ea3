"""One answer: match the prefix, prefill in chunks, decode draft by draft, and say what happens meanwhile.

It runs nothing itself: it says which rows it wants next, and goes on with what came.
"""

from __future__ import annotations

import io
import threading
import time
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tinychat.backends.interface import BLOCK
from tinychat.base.events import Completion, Done, Event, FinishReason, Notice, Reading, Stats, TextDelta
from tinychat.base.machine import peak_rss
from tinychat.engine.eviction import Votes
from tinychat.engine.guide import Guide
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.odds import Odds
from tinychat.engine.owned import OwnedBranch
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, best_of, choose_seed, greedy, masked, sample
from tinychat.engine.scheduler import Rows
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.acceptance import rejection
from tinychat.engine.speculation.control import MAX_DRAFT
from tinychat.engine.speculation.speculator import Speculator
from tinychat.engine.wishes import NOTHING, Begun, Home, Room, Wish
from tinychat.text.calls.caller import Caller
from tinychat.text.reasoning import Splitter
from tinychat.text.stopping import Outlet, Said, cut_ids
from tinychat.text.tokenizer import StreamDecoder


class Generation:
    """The state of one answer."""

    def __init__(
        self,
        engine: Home,
        branch: OwnedBranch,
        prompt: list[int],
        params: SamplingParams,
        cancel: threading.Event,
        speculator: Speculator,
        splitter: Splitter | None = None,
        begun: Begun = NOTHING,
        caller: Caller | None = None,
        guide: Guide | None = None,
        odds: Odds | None = None,
    ):
        self.engine, self.branch, self.speculator = engine, branch, speculator
        self.prompt, self.cancel = [*prompt, *begun.ids], cancel  # what is read first
        if params.max_tokens is None and branch.ledger:
            # Nothing else would end an answer that runs in circles.
            params = params.but(max_tokens=engine.n_ctx)
        self.params, self.odds, self.guide = params, odds, guide
        self.context = array("i", self.prompt)  # and the answer's tokens so far; it may have no end
        self.shown = caller.shown if caller else frozenset[int]()
        self.decoder = StreamDecoder(engine.tokenizer, continued=True, shown=self.shown)
        self.outlet = Outlet(params.stop, splitter, caller)
        self.seed = choose_seed(params)
        self.began_evicted = self.evicted_before = branch.evicted
        self.notices: list[str] = []
        self.ids, self.n_begun = array("i", begun.ids), len(begun.ids)
        self._decided: list[int] = []  # by the last step
        self.steps = self.decided = 0  # decode steps, and the tokens that they decided
        self.chosen = 0  # the stop token counts as a step too
        self.text, self.reasoning, self.written = io.StringIO(), io.StringIO(), io.StringIO()
        self.stats = Stats(prompt_tokens=len(self.prompt))
        self._repeated = ""  # what was said before of that which the gates hold back
        self._go_on(begun)

    def _go_on(self, begun: Begun) -> None:
        """Bring the gates to where an answer that goes on left them. They hold back what may become a marker
        or a stop string, though it was said when the answer ended there: it is not said again.
        """
        for i, token in enumerate(begun.ids, 1):
            if self.guide is not None and self.guide.recall(token):
                self.outlet.answers()
            said = self.outlet.recall(self.decoder.push(token))
            self._write(said)
            if said.reasoning or self.outlet.thinking:
                self.stats.reasoning_tokens = i
        n = self.written.tell()
        if begun.written.startswith(self.written.getvalue()):
            self._repeated = begun.written[n:]

    def events(self) -> Generator[Event | Wish, None, None]:
        """Prefill, then a TextDelta a token, then Done. In between, what is needed for the next one: `Rows`
        to run, whose error is thrown in, or `Room` to wait for.
        """
        began = time.perf_counter()
        first_token = yield from self._prefill()
        yield from self._take_notices()
        if first_token is None:
            yield self._done("cancelled", began, began)
            return
        first = last = time.perf_counter()
        self.stats.ttft_s = first - began
        reason: FinishReason = "length"
        if self._may_continue():
            self.speculator.begin(self.context, self.branch)
        decided = deque([first_token])
        while self._may_continue():
            if not decided:
                decided.extend((yield from self._decide()))
            yield from self._take_notices()
            if not decided:
                reason = "cancelled" if self.cancel.is_set() else "context_full"
                break
            token = decided.popleft()
            self.chosen += 1
            last = time.perf_counter()
            if token in self.engine.tokenizer.eos_ids:
                reason = "stop"
                break
            self.ids.append(token)
            self.context.append(token)
            if self.guide is not None and self.guide.push(token):
                self.outlet.answers()
            thinking = self.outlet.thinking
            yield from self._deltas(self.outlet.push(self.decoder.push(token)), token)
            if thinking or self.outlet.thinking:
                self.stats.reasoning_tokens = len(self.ids)
            if self.outlet.stopped or self.outlet.called or (self.guide is not None and self.guide.finished):
                reason = "stop"
                break
            if self.guide is not None and self.guide.over:
                self.guide = None
            if self.cancel.is_set() and self._may_continue():
                reason = "cancelled"
                break
        for rest in (self.outlet.push(self.decoder.flush()), self.outlet.flush()):
            if any(rest):
                yield from self._deltas(rest, None)
        if self.outlet.stopped:
            reason = "stop"
        if reason == "stop" and self.outlet.calls:
            reason = "tool_calls"
        yield self._done(reason, first, last)

    def _deltas(self, said: Said, token: int | None) -> Iterator[Event]:
        self._write(said)
        (text, reasoning, written, calls, _), uncalled = said, said.uncalled
        if self._repeated and written:
            known, self._repeated = self._repeated, ""
            if written.startswith(known) or known.startswith(written):
                again = known[: len(written)]
                self._repeated = known[len(again) :]
                text, reasoning, written = (s.removeprefix(again) for s in (text, reasoning, written))
                uncalled = uncalled and uncalled.removeprefix(again)
        told = self.odds.told(len(self.context) - 1) if self.odds and token is not None else None
        yield TextDelta(text, token, reasoning, written, told, uncalled)
        yield from calls

    def _write(self, said: Said) -> None:
        self.text.write(said.text)
        self.reasoning.write(said.reasoning)
        self.written.write(said.written)

    def _decide(self) -> Generator[Event | Wish, None, list[int]]:
        """A step and the tokens that it decides: none when the context is full, or when it is cancelled while
        others hold the memory that it needs.
        """
        while (room := self._room()) >= 0:
            if self.params.max_tokens is not None:
                room = min(room, self.params.max_tokens - self.generated - 1)
            room = min(room, self.engine.backend.max_rows - 1)
            draft = self._draft(room)
            window = [self.context[-1], *draft.tokens]
            held = len(self.context) - 1
            rows = Rows(self.branch, window, 0, self._rows_for, partial(self._verify, draft), held=held)
            rows.masked = self._masks
            try:
                yield rows
            except PoolExhaustedError:
                if not (yield from self._read_again()):
                    break
                continue
            decided, self.speculator.company = self._decided, rows.company
            kept = len(decided) - 1
            if not rows.shared and not draft.forced:  # its time says nothing of what drafts cost otherwise
                self.speculator.note(kept, rows.seconds)
            self.stats.drafted_tokens += len(draft.tokens)
            self.stats.accepted_tokens += kept
            self.steps += 1
            self.decided += len(decided)
            return decided
        return []

    def _draft(self, room: int) -> Draft:
        """Guesses for the next window: what has to come, or else what somebody drafts."""
        guide = self.guide
        if guide is not None:
            if guide.hurried:
                guide.hurry()
            if self.speculator.drafter is not None and (due := guide.forced(min(room, MAX_DRAFT))):
                return Draft(due, forced=True)
        return self.speculator.propose(self.context, room, self.params, self.seed, guide)

    @property
    def _masks(self) -> bool:
        return self.guide is not None and self.guide.reads

    def _take_notices(self) -> Iterator[Notice]:
        if self._given_up and self.branch.ledger and not self.evicted_before:
            self.evicted_before = self.branch.evicted
            policy = self.branch.ledger.policy
            who = "what the model attends to least is" if policy.name == "h2o" else "the oldest are"
            yield Notice(f"The KV cache's {policy.budget} tokens are full: from here on {who} given up.")
        if notice := self.speculator.take_notice():
            yield Notice(notice)
        while self.notices:
            yield Notice(self.notices.pop(0))

    @property
    def _given_up(self) -> int:
        """Tokens without a slot in the layers that would see all of them, if there are any."""
        layers, _ = self.branch.ledger.shape if self.branch.ledger else (0, 0)
        return self.branch.evicted if layers else 0

    def _room(self, n: int | None = None) -> int:
        """Tokens that fit behind the one of the next step, of n that were said (default: all); negative when
        the context is full.
        """
        branch = self.branch
        if branch.ledger is None:
            return self.engine.n_ctx - (len(self.context) if n is None else n)
        # A window never crosses an eviction: what is given up must not depend on how many were drafted.
        left = branch.ledger.policy.budget - branch.slots
        room = (left or BLOCK) - 1
        left = self.engine.trained_context - branch.position
        return min(room, left - 1) if left > 0 else room

    def _verify(self, draft: Draft, out: Sequence[Any]) -> int:
        """Tokens that a window decides: the accepted drafts, then the first that differs, or one more after
        them all. Returns how many that are: as many of its rows stay.
        """
        decided: list[int] = []
        guide = self.guide
        for i, row in enumerate(out):
            drafted = draft.tokens[i] if i < len(draft.tokens) else None
            q = draft.distributions[i] if drafted is not None and draft.distributions else None
            decided.append(self._choose(row, drafted, q, decided, guide))
            if self.odds:
                self.odds.note(len(self.context) + len(decided) - 1, row, decided[-1])
            if decided[-1] != drafted or drafted in self.engine.tokenizer.eos_ids:
                break
            if guide is not None:  # the answer's own goes on when these are given out
                guide = guide.fork() if guide is self.guide else guide
                guide.push(drafted)
                if guide.finished:
                    break
        self._decided = decided
        return len(decided)

    @property
    def _rows_for(self) -> SamplingParams | None:
        """Settings that rows need to suffice for; None where whole ones are wanted."""
        return None if self.odds else self.params

    def _may_continue(self) -> bool:
        return self.params.max_tokens is None or self.generated < self.params.max_tokens

    @property
    def generated(self) -> int:
        """Tokens that this generation has said."""
        return len(self.ids) - self.n_begun

    def _prefill(self) -> Generator[Event | Wish, None, int | None]:
        """Fill the cache with the prompt; the token that follows it, or None if cancelled."""
        while not self.cancel.is_set():
            try:
                return (yield from self._fill())
            except PoolExhaustedError:
                yield self._needed()
        return None

    def _needed(self) -> Room:
        """Others hold all the memory, or took what this answer had."""
        n, ledger = len(self.context) + 1, self.branch.ledger
        return Room(self.branch, min(n, ledger.policy.budget) if ledger else n, self.cancel)

    def _read_again(self) -> Generator[Event | Wish, None, bool]:
        """Have what the branch held before it gave way: the prompt, then the answer so far as it was made,
        with the same votes. False if it was cancelled.
        """
        engine, branch, end, stats = self.engine, self.branch, len(self.context) - 1, replace(self.stats)
        if self.began_evicted:
            self.notices.append("Memory was short, and this conversation gave way; it is read again.")
        while not self.cancel.is_set():
            yield self._needed()
            try:
                if branch.ledger is None:
                    with engine.changing():
                        at = branch.match(self.context[:end])
                elif (yield from self._fill(heard=False)) is None:
                    break
                else:
                    at = len(self.prompt)
                while at < end and not self.cancel.is_set():
                    n = 1 + min(self._room(at + 1), engine.backend.max_rows - 1)
                    ids = self.context[at : min(at + n, end)]
                    rows = Rows(branch, ids, len(ids), prompt=True, held=at, cancel=self.cancel)
                    yield rows
                    at += rows.ran
                self.stats = stats
                return at == end
            except PoolExhaustedError:
                pass  # it had to give way once more
        return False

    def _fill(self, heard: bool = True) -> Generator[Event | Wish, None, int | None]:
        """Read the prompt once. Raises PoolExhaustedError. heard: somebody asks how far it is; not in the
        middle of an answer.
        """
        engine, branch = self.engine, self.branch
        with engine.changing():
            # The last token always runs: its logits are what comes next.
            evicted = branch.evicted
            policy = branch.ledger and branch.ledger.policy
            limit = policy.first_voter(len(self.prompt)) if policy else None
            again = branch.rewind(self.prompt)
            cached = len(branch) if again else branch.match(self.prompt[:-1], limit)
        if evicted and not branch.evicted:
            self.notices.append("Earlier tokens of this conversation had been given up; it is read again.")
            self.evicted_before = 0
        self.stats.cached_tokens = cached
        if (n := len(self.prompt) - cached) > engine.n_ctx:
            self.notices.append(
                f"{n:,} tokens are being read and the context holds {engine.n_ctx:,}: "
                "much of them is given up meanwhile."
            )
            if heard:
                yield from self._take_notices()
        if not again:
            return (yield from self._read(cached, heard))
        try:
            return (yield from self._read(cached, heard, again))
        except BaseException:
            with engine.changing():
                branch.free()  # until `recall` it holds what the answer before voted
            raise

    def _read(
        self, at: int, heard: bool, again: Votes | None = None
    ) -> Generator[Event | Wish, None, int | None]:
        """The prompt from token `at` on; `again`: its last token, which has voted already."""
        began, cached, n = time.perf_counter(), at, len(self.prompt)
        while not self.cancel.is_set() or again:
            rows = self._rest(at, again)
            yield rows
            at += rows.ran
            rate = (at - cached) / max(time.perf_counter() - began, 1e-9)
            if at == n:
                self.stats.prefill_tps = rate
                return self._decided[0]
            if heard and rows.ran:
                yield Reading(at, n, rate)
        return None

    def _rest(self, at: int, again: Votes | None) -> Rows:
        """The prompt from token `at` on, as far as a step may read.

        Where eviction may come, prompts have chunks of a constant size, and fixed queries vote: room is made
        for the whole chunk that token `at` lies in, however many tokens of it a step reads.
        """
        branch, ledger, n = self.branch, self.branch.ledger, len(self.prompt)
        end, votes_from = n, at
        if ledger:
            end = ledger.policy.chunk_end(at, n)
            slots = branch.slots - ledger.policy.excess(branch.slots, end - at)
            votes_from = n if again else end - ledger.policy.voters(end, slots + end - at, n)
        ids = self.prompt[at : min(end, at + self.engine.backend.max_rows)]
        last = at + len(ids) == n
        rows = Rows(self.branch, ids, len(ids) - last, self._rows_for, prompt=True, held=at, room=end - at)
        rows.votes_from = votes_from - at
        if last:
            rows.masked = self._masks
            rows.take = partial(self._begin, len(ids))
            rows.then = partial(self._was_read, again)
        if not again:
            rows.cancel = self.cancel
        return rows

    def _was_read(self, again: Votes | None) -> None:
        """The prompt is in the branch: somebody may want to come back here."""
        self.branch.keep()
        if ledger := self.branch.ledger:
            ledger.recall(again) if again else ledger.remember()

    def _begin(self, n: int, out: Sequence[Any]) -> int:
        """The first token, from the logits of the prompt's last. All n rows stay."""
        again = self.context[len(self.prompt) :]  # the answer is there, and its prompt is read once more
        self._decided = [again[0] if again else self._choose(out[0], None, guide=self.guide)]
        if self.odds and not again:
            self.odds.note(len(self.context), out[0], self._decided[0])
        return n

    def _choose(
        self, row, drafted: int | None, q=None, before: Sequence[int] = (), guide: Guide | None = None
    ) -> int:
        """The token that follows the context and `before`, from its row of logits (or its argmax), where
        `guide` is.
        """
        due = guide.next() if guide is not None else None
        if isinstance(due, int):
            return due
        answer = len(self.prompt) - self.n_begun
        penalties = Penalties.of(self.params, row, self.context, before, answer)
        if due is not None:
            row = masked(row, due)
        elif self.params.greedy:
            return greedy(best_of(row) if self.odds else row)
        position = len(self.context) + len(before)
        if drafted is not None and self.speculator.rule == "rejection":
            return rejection(row, drafted, q, self.params, self.seed, position, penalties)
        return sample(row, self.params, self.seed, position, penalties)

    def _done(self, reason: FinishReason, first: float, last: float) -> Done:
        s = self.stats
        ids = self.ids.tolist()
        if self.outlet.stopped:
            ids = cut_ids(self.engine.tokenizer, ids, self.written.getvalue(), self.shown)
        s.generated_tokens = self.generated
        if self.chosen > 1:
            s.tpot_s = (last - first) / (self.chosen - 1)
            s.decode_tps = 1 / s.tpot_s if s.tpot_s else 0.0
        if self.steps:
            s.tokens_per_step = self.decided / self.steps
            s.draft_speedup = self.speculator.speed_up()
        s.kv_bytes = self.engine.kv_bytes()
        s.evicted_tokens = self._given_up
        s.peak_rss_bytes = peak_rss()
        text, reasoning, written = (s.getvalue() for s in (self.text, self.reasoning, self.written))
        stop = self.outlet.matcher.matched
        completion = Completion(text, ids, reason, s, reasoning, self.outlet.calls, written, stop)
        return Done(reason, s, completion)
