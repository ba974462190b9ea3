"""Steps over several sequences: each says which rows it wants run, and whoever comes first runs all of them.

There is no thread of the engine's own. An answer is an iterator, and the thread that asks for its next token
puts down what that takes (`Rows`). One of the threads that wait leads: it composes a step of everything that
is wanted by then, runs it, and hands out what came. So nothing runs that nobody asked for, an answer that
nobody reads on holds nobody up, Ctrl+C is heard where it is pressed, and one conversation alone pays nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinychat.backends.interface import BLOCK, Backend
from tinychat.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from tinychat.base.claims import Claim
    from tinychat.engine.owned import OwnedBranch

CHUNK_SECONDS = 0.4  # a step that reads a prompt aims at this, so that a cancel is felt at once
BESIDE_SECONDS = 0.12  # and at this where running answers wait for its end
RETURN_SECONDS = 0.002  # a step waits so long for the next of the answers that were in the last one,
RETURN_SHARE = 0.125  # or for this part of a step: who misses one waits for all of it
LOOK_SECONDS = 0.05  # who waits for a step looks around this often


@dataclass(eq=False)
class Rows:
    """Rows that a sequence wants in the next step: tokens that are appended to its branch.

    branch       whose they are
    ids          the tokens. Of a prompt, as many of the first as the step has room for are run; else all
    prompt       whether that is so, and all of them stay; else those behind the first are drafts
    logits_from  rows from this one on get logits
    params       how tokens are chosen from these. Then the rows may be what suffices for that: ids where it
                 is greedy, or `LargestLogits`
    masked       whether some tokens may be ruled out: then no id suffices
    take         is given the rows of logits, and says how many of the tokens stay in the branch. It may be
                 called by any thread, and again after an interrupt; the rows hold until it returns. Of a
                 prompt it is called with the last token
    then         is called when all tokens are in the branch, before anybody else may change it
    votes_from   rows from this one on tell an eviction policy what they attend to
    held         tokens that the branch is believed to have
    room         tokens for which room is made, where the branch evicts; default: those that are run
    cancel       while the rows wait: they are no longer wanted

    When it is done, `ran` says how many rows ran, or `error` why none did: PoolExhaustedError if there is no
    room even after others gave way, or if the branch itself had to.
    """

    branch: OwnedBranch
    ids: Sequence[int]
    logits_from: int
    params: SamplingParams | None = None
    take: Callable[[Any], int] | None = None
    then: Callable[[], None] | None = None
    prompt: bool = False
    votes_from: int = 0
    held: int | None = None
    room: int | None = None
    cancel: threading.Event | None = None
    masked: bool = False

    ran: int = 0
    done: bool = False
    error: BaseException | None = None
    seconds: float = 0.0  # of the step
    shared: bool = False  # whether a prompt's chunk was in the step
    company: bool = False  # whether rows of others were

    thread: int = 0  # that waits
    wake: threading.Lock = field(default_factory=threading.Lock)
    in_time: bool = True  # whether its thread came back at once the last time

    def finish(self, ran: int = 0, error: BaseException | None = None) -> None:
        """It has run, or will not."""
        self.ran, self.error = ran, error
        self.done = True


@dataclass
class _Due:
    """An answer that was in the last step: its thread may soon be back with the next rows."""

    thread: int
    since: float
    in_time: bool  # whether it was the last time
    given_up: bool = False

    @property
    def may_come(self) -> bool:
        """Whether it is worth to wait for."""
        return self.in_time and not self.given_up


class Scheduler:
    """Composes steps of what sequences want, and sees to it that somebody runs them."""

    def __init__(self, backend: Backend, execute: Callable[[Sequence[tuple[Rows, int]]], None]):
        """execute: run the first n rows of each in one step. What concerns one of them alone becomes its
        `error`; what goes wrong with the step is raised, and then they may be run again.
        """
        self.backend, self._execute = backend, execute
        self._rate = 0.0  # rows a second of steps that read prompts
        self._seconds = 0.0  # of the last step in which nobody read a prompt
        self._passed: OwnedBranch | None = None  # whose prompt had to wait in the last step
        self.forked()

    def forked(self) -> None:
        """Nobody waits: this is a child process, or the beginning."""
        self._wanted: list[Rows] = []
        self._leading = threading.Lock()
        self._arrived = threading.Event()
        self._due: dict[Claim, _Due] = {}

    # What a step has

    def compose(self, wanted: Sequence[Rows]) -> list[tuple[Rows, int]]:
        """The next step: rows of running answers in the order in which they came, then one chunk of a prompt;
        each with how many of its rows run.
        """
        backend = self.backend
        spans, left = backend.max_spans, backend.max_rows
        decoded: list[tuple[Rows, int]] = []
        prompts: list[Rows] = []
        for rows in wanted:
            if rows.prompt:
                prompts.append(rows)
                if len(prompts) == 1:
                    spans, left = spans - 1, left - min(BLOCK, len(rows.ids))
            elif len(rows.ids) <= left and spans:
                decoded.append((rows, len(rows.ids)))
                spans, left = spans - 1, left - len(rows.ids)
            if not spans:
                break
        if not prompts:
            return decoded
        first = self._next_prompt(prompts)
        others = bool(decoded) or any(not due.given_up for due in self._due.values())
        n = min(self.chunk_size(others), backend.max_rows - sum(n for _, n in decoded), len(first.ids))
        return [*decoded, (first, n)] if n else decoded

    def _next_prompt(self, prompts: Sequence[Rows]) -> Rows:
        """The prompt of which least is left, so that a question need not wait for a book. One that has begun
        before it is passed over in one step, not in two: it is read at half its speed at least.
        """
        oldest = min(prompts, key=lambda rows: rows.branch.since)
        shortest = min(prompts, key=lambda rows: (len(rows.ids), rows.branch.since))
        passed = self._passed is oldest.branch
        self._passed = None if passed or shortest is oldest else oldest.branch
        return oldest if passed else shortest

    def chunk_size(self, beside: bool = False) -> int:
        """Rows of a prompt's next chunk: a whole number of blocks, about CHUNK_SECONDS of work. beside: about
        BESIDE_SECONDS, since running answers wait for the end of the step.
        """
        if not self._rate:
            return min(BLOCK if beside else 64, self.backend.max_rows)
        rows = int(self._rate * (BESIDE_SECONDS if beside else CHUNK_SECONDS)) // BLOCK * BLOCK
        return max(BLOCK, min(rows, self.backend.max_rows))

    def step(self, wanted: Sequence[Rows]) -> list[Rows]:
        """Run one step of what these want; those that were in it. A step of several that fails is run again
        one by one, so that only those who are to blame hear of it.
        """
        parts = self.compose(wanted)
        try:
            self._timed(parts)
        except Exception as e:
            if len(parts) == 1:
                parts[0][0].finish(error=e)
            for rows, n in parts:
                if not rows.done:
                    self._alone(rows, n)
        return [rows for rows, _ in parts]

    def _alone(self, rows: Rows, n: int) -> None:
        try:
            self._timed([(rows, n)])
        except Exception as e:
            rows.finish(error=e)

    def _timed(self, parts: list[tuple[Rows, int]]) -> None:
        began = time.perf_counter()
        self._execute(parts)
        seconds = time.perf_counter() - began
        n, prompt = sum(n for _, n in parts), any(rows.prompt for rows, _ in parts)
        for rows, _ in parts:
            rows.seconds, rows.shared, rows.company = seconds, prompt, len(parts) > 1
        if not prompt:
            self._seconds = seconds
        elif n >= BLOCK:
            self._rate = n / max(seconds, 1e-6)

    # Who runs it

    def run(self, rows: Rows) -> None:
        """Have these rows run, by this thread or by another that leads meanwhile. Raises their `error`; rows
        that were cancelled before their turn came have `ran` nothing.
        """
        try:
            self._post(rows)
            while not rows.done:
                if self._leading.locked():
                    rows.wake.acquire(timeout=LOOK_SECONDS)
                    if not rows.done and rows.cancel is not None and rows.cancel.is_set():
                        break
                else:
                    with self._leading:
                        if not rows.done:
                            self._lead()
                    self._pass_on()
        finally:
            if not rows.done:
                self._withdraw(rows)
                self._pass_on()
        if rows.error is not None:
            raise rows.error

    def leave(self, branch: OwnedBranch) -> None:
        """Its answer has come to its end: nobody waits for it."""
        if self._due.pop(branch.claim, None):
            self._arrived.set()

    def _post(self, rows: Rows) -> None:
        rows.thread = threading.get_ident()
        rows.wake.acquire(blocking=False)
        due = self._due.get(rows.branch.claim)
        if due is not None:
            soon = time.monotonic() - due.since <= self.patience
            rows.in_time = soon or due.may_come
        for other in list(self._wanted):
            if other.branch is rows.branch:  # of an answer that was interrupted before it could withdraw them
                self._withdraw(other)
        self._wanted.append(rows)
        self.leave(rows.branch)

    def _withdraw(self, rows: Rows) -> None:
        with suppress(ValueError):
            self._wanted.remove(rows)

    def _lead(self) -> None:
        self._gather()
        wanted = list(self._wanted)
        for rows in wanted:
            if rows.cancel is not None and rows.cancel.is_set():
                rows.finish()
        try:
            ran = self.step([rows for rows in wanted if not rows.done])
            now = time.monotonic()
            late = {c: due for c, due in list(self._due.items()) if due.given_up and c.generator is not None}
            self._due = late | {rows.branch.claim: _Due(rows.thread, now, rows.in_time) for rows in ran}
        finally:
            for rows in wanted:
                if rows.done:
                    self._withdraw(rows)
                    _wake(rows)

    @property
    def patience(self) -> float:
        """Seconds that a step waits for the next one who is on his way back."""
        return max(RETURN_SECONDS, RETURN_SHARE * self._seconds)

    def _gather(self) -> None:
        """Wait for those that were in the last step, as long as one after the other comes: together they cost
        little more than one. Nobody waits for an answer of his own thread, nor for one that was late.
        """
        me = threading.get_ident()
        while True:
            self._arrived.clear()
            here = {rows.branch.claim for rows in list(self._wanted)}
            missing = [
                due
                for claim, due in list(self._due.items())
                if claim not in here and due.thread != me and due.may_come and claim.generator is not None
            ]
            if not missing:
                return
            if not self._arrived.wait(self.patience):
                for due in missing:
                    due.given_up = True

    def _pass_on(self) -> None:
        """Wake one of those who wait, to lead."""
        for rows in list(self._wanted):
            if not rows.done:
                return _wake(rows)


def _wake(rows: Rows) -> None:
    with suppress(RuntimeError):  # it is awake
        rows.wake.release()
