"""One backend and what lives in its memories: steps, room for them, and who has to give room up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np

from tinychat.backends.interface import BLOCK, Backend, Span
from tinychat.base.claims import Claim
from tinychat.base.errors import UsageError
from tinychat.base.events import Done, Event
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.generation import Generation
from tinychat.engine.guide import Guide
from tinychat.engine.memory.memories import Memories
from tinychat.engine.memory.pool import BlockPool, PoolExhaustedError
from tinychat.engine.odds import Odds
from tinychat.engine.owned import OwnedBranch
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.scheduler import Rows, Scheduler
from tinychat.engine.speculation.speculator import Speculator
from tinychat.engine.step import Part, run_step
from tinychat.engine.wishes import NOTHING, Begun, Room, Wish
from tinychat.text.calls.caller import Caller
from tinychat.text.reasoning import Splitter
from tinychat.text.tokenizer import Tokenizer

T = TypeVar("T")

POLL_SECONDS = 0.05  # an answer that waits for memory looks around this often
YIELD_SECONDS = 0.005  # a step lets a fork go first
FORK_SECONDS = 5.0  # a fork waits for the end of a step, at most so long
PATIENCE_SECONDS = 1.0  # an answer that nobody goes on with for so long gives way to one that waits


class Engine:
    """One backend, its memories, and the branches that live there. Steps are serialised; calls may come from
    any thread.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        n_ctx: int,
        trained_context: int | None = None,
        more_bytes: Callable[[], int] = lambda: 0,
    ):
        """n_ctx: tokens that a conversation may hold; the pools begin with room for one that is full.
        trained_context: positions that the model knows; a conversation that evicts never goes beyond them.
        more_bytes: how much memory there is that the pools do not have yet.
        """
        self.backend, self.tokenizer, self.n_ctx = backend, tokenizer, n_ctx
        self.trained_context = trained_context or n_ctx
        self.memories = Memories(backend, n_ctx, more_bytes)
        self.lock = threading.RLock()
        self._unfinished = False  # a change of branches: in the making, or interrupted by an exception
        self._branches: WeakSet[OwnedBranch] = WeakSet()
        self._process = os.getpid()
        _engines.add(self)
        self.scheduler = Scheduler(backend, self.execute)
        self._in_step: list[OwnedBranch] = []  # have room in the step that is being prepared
        self._clock = 0
        self.closed = False
        self.makes_way: Callable[[OwnedBranch], None] = lambda branch: None  # hears of an idle one first

    def branch(self, policy: EvictionPolicy | None = None) -> OwnedBranch:
        """A new, empty sequence. With a policy it may outgrow its budget; without, it ends where the context
        is full.
        """
        ledger = self.memories.ledger(policy) if policy else None
        return self._known(OwnedBranch(self.memories.parts(), self._known, ledger))

    def _known(self, branch: OwnedBranch) -> OwnedBranch:
        with self.lock:
            self._branches.add(branch)
        return branch

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The lock, for one change of branches. If an exception comes in the middle (Ctrl+C may come
        anywhere), everything is put in order before the next change. Does not nest.
        """
        if self._process != os.getpid() and not self.backend.survives_fork:
            raise UsageError(
                f"The {self.backend.name} backend does not work in a forked process.", "Load the model there."
            )
        if _forks:
            time.sleep(YIELD_SECONDS)  # whoever forks wants the lock
        with self.lock:
            if self._unfinished:
                self._repair()
            self._unfinished = True
            yield
            self._unfinished = False

    def _repair(self) -> None:
        branches = list(self._branches)
        for branch in branches:
            branch.repair()
        self.memories.rebuild(branches)

    def forked(self) -> None:
        """This is a child process: of the threads only the present one is here."""
        self.lock, self.tokenizer.lock = threading.RLock(), threading.Lock()
        self.scheduler.forked()

    def run(
        self,
        branch: OwnedBranch,
        ids: Sequence[int],
        first_logit: int,
        params: SamplingParams | None = None,
        accept: Callable[[Any], int] | None = None,
        watched: int | None = None,
        held: int | None = None,
        masked: bool = False,
    ) -> Any:
        """Append `ids` to the branch in a step of their own; logits from row `first_logit` on, which are
        returned.

        params, held, masked: as in `Rows`. accept: given that output, how many of `ids` stay in the cache;
        without it all of them do. watched: how many of the last rows tell an eviction policy what they attend
        to; default: all. Raises what `Rows.error` would be.
        """
        out = []

        def take(rows: Any) -> int:
            out.append(rows)
            return len(ids) if accept is None else accept(rows)

        n = len(ids)
        votes_from = 0 if watched is None else n - watched
        rows = Rows(
            branch, ids, first_logit, params, take, prompt=accept is None, votes_from=votes_from, held=held
        )
        rows.masked = masked
        self.execute([(rows, n)])
        if rows.error is not None:
            raise rows.error
        return out[0]

    def execute(self, parts: Sequence[tuple[Rows, int]]) -> None:
        """One step over the first n rows of each; afterwards these are done. What concerns one of them alone
        becomes its `error`. Raises what goes wrong with the step itself: then none of them is done.
        """
        with self.lock:
            with self.changing():
                self._check_open()
                if ready := self._prepared(parts):
                    run_step(self.backend, ready)
            self._unfinished = any(rows.error is not None for rows, _ in parts)

    def _prepared(self, parts: Sequence[tuple[Rows, int]]) -> list[Part]:
        """Those that have room now, in their order. Who began first asks first: he may take the room of later
        ones, and these find it out.
        """
        ready: dict[Rows, Part] = {}
        self._in_step.clear()
        for rows, n in sorted(parts, key=lambda part: part[0].branch.since):
            try:
                ready[rows] = self._prepare(rows, n)
                self._in_step.append(rows.branch)
            except Exception as e:
                rows.finish(error=e)
        self._in_step.clear()
        return [ready[rows] for rows, _ in parts if rows in ready]

    def _prepare(self, rows: Rows, n: int) -> Part:
        branch, ledger = rows.branch, rows.branch.ledger
        self._clock += 1
        branch.last_used = self._clock
        if rows.held is not None and len(branch) != rows.held:
            raise PoolExhaustedError
        for room in (rows.room or n, n):
            self._make_room(branch, room)
        stay, scores, voters = rows.prompt or n == 1, None, 0  # the first is no draft
        self._take(branch, lambda: branch.reserve(n, each=not stay))
        if ledger and ledger.watches:
            voters = min(n, max(0, n - rows.votes_from))
            if voters and stay:
                scores = ledger.tally(n)
            elif voters:
                scores = np.zeros((voters, *ledger.shape, branch.slots + n), np.float32)
        tokens = np.asarray(rows.ids[:n], dtype=np.int32)
        span = Span(tokens, branch.position, min(rows.logits_from, n), branch.spans(scores, voters))
        return Part(rows, n, span, stay, scores, voters)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError("The model is closed.", "Load it again.")

    def _make_room(self, branch: OwnedBranch, n: int) -> None:
        ledger = branch.ledger
        if ledger is None:
            return
        excess = ledger.policy.excess(branch.slots, n)
        if excess:
            self._take(branch, lambda: branch.own(excess))
            self.memories.give_up(branch, excess)
        if branch.position + n > self.trained_context and branch.slots + n <= self.trained_context:
            self._take(branch, branch.own_all)
            self.memories.renumber(branch)

    def logits(self, ids: Sequence[int], policy: EvictionPolicy | None = None) -> np.ndarray:
        """float32 [n_tokens, vocab] for every position of `ids`, computed from nothing cached.

        With an eviction policy, in steps of BLOCK tokens, as if they had been drafted: nearly token by token.
        """
        self.check_prompt(ids, policy is not None)
        branch, chunk = self.branch(policy), BLOCK if policy else self.backend.max_rows
        while True:
            steps = (self.run(branch, ids[i : i + chunk], 0, held=i) for i in range(0, len(ids), chunk))
            try:
                return np.concatenate(list(self._claimed(branch, steps)))
            except PoolExhaustedError:
                self.wait_for_room(branch, len(ids))

    def generate(
        self,
        branch: OwnedBranch,
        prompt: Sequence[int],
        params: SamplingParams,
        cancel: threading.Event | None = None,
        speculator: Speculator | None = None,
        splitter: Splitter | None = None,
        begun: Begun = NOTHING,
        caller: Caller | None = None,
        guide: Guide | None = None,
        odds: Odds | None = None,
    ) -> Generator[Event, None, None]:
        """Continue `prompt` on `branch`. Yields TextDelta for each token, and Done last.

        speculator: drafts tokens that are verified several at a time; the text is the same without it.
        splitter: tells reasoning from the answer; without it all is the answer. caller: finds calls of tools.
        guide: says which tokens may come, and which ones have to.
        odds: notes what the model thought of each token.
        begun: an answer to the prompt that goes on; only what is new of it is said.
        Raises UsageError before anything is computed if the prompt is empty or leaves no room in the context.
        """
        going = self.going(branch, prompt, params, cancel, speculator, splitter, begun, caller, guide, odds)
        return self._served(branch, going)

    def going(
        self,
        branch: OwnedBranch,
        prompt: Sequence[int],
        params: SamplingParams,
        cancel: threading.Event | None = None,
        speculator: Speculator | None = None,
        splitter: Splitter | None = None,
        begun: Begun = NOTHING,
        caller: Caller | None = None,
        guide: Guide | None = None,
        odds: Odds | None = None,
    ) -> Generator[Event | Wish, None, None]:
        """The same, for a caller who sees to what it wants in between (`Generation.events`)."""
        self.check_prompt([*prompt, *begun.ids], branch.ledger is not None)
        cancel, speculator = cancel or threading.Event(), speculator or Speculator()
        generation = Generation(
            self, branch, list(prompt), params, cancel, speculator, splitter, begun, caller, guide, odds
        )
        return self._claimed(branch, generation.events())

    def _served(
        self, branch: OwnedBranch, going: Generator[Event | Wish, None, None]
    ) -> Generator[Event, None, None]:
        """The events of an answer, while what it wants is done."""
        try:
            said = next(going)
            while True:
                try:
                    if isinstance(said, Rows):
                        self.scheduler.run(said)
                    elif isinstance(said, Room):
                        self.wait_for_room(said.branch, said.n, said.cancel)
                    else:
                        if isinstance(said, Done):
                            self.scheduler.leave(branch)
                        yield said
                except BaseException as e:
                    said = going.throw(e)
                else:
                    said = next(going)
        except StopIteration:
            pass
        finally:
            going.close()
            self.scheduler.leave(branch)

    def _claimed(self, branch: OwnedBranch, steps: Iterator[T]) -> Generator[T, None, None]:
        """The items of `steps`. One user of a branch at a time; only older ones that find no room reclaim its
        blocks meanwhile.
        """
        claim = Claim()

        def claimed() -> Generator[T, None, None]:
            with self.changing():
                if branch.busy:
                    raise UsageError(
                        "This conversation is still answering.", "Cancel it, or wait for its last event."
                    )
                self._clock += 1
                branch.since, branch.claim = self._clock, claim
            yield from steps

        return claim.of(claimed())

    def close(self) -> None:
        """Refuse every later step, and release the backend once the present one is done. Idempotent."""
        with self.lock:
            self.closed = True
            self.backend.close()

    def check_prompt(self, prompt: Sequence[int], evicts: bool = False) -> None:
        """Raises UsageError if the prompt is empty, or finds no room where nothing is given up."""
        if len(prompt) == 0:
            raise UsageError("The prompt is empty.", "Give at least one character.")
        if len(prompt) > self.n_ctx and not evicts:
            wanted = min(-(-(len(prompt) + 1) // 1024) * 1024, self.trained_context)
            larger = f", or ask for a larger context: --ctx {wanted}" if wanted > len(prompt) else ""
            raise UsageError(
                f"The prompt has {len(prompt)} tokens and the context holds {self.n_ctx}.",
                f"Shorten it{larger}.",
            )

    def kv_bytes(self) -> int:
        """Bytes of all memories that hold something."""
        with self.changing():
            return self.memories.used_bytes()

    # Room in the pools

    def make(self, branch: OwnedBranch, n: int, evicted: int) -> None:
        """Have room in an empty branch for what was saved of n tokens. Raises PoolExhaustedError if others
        that are busy hold it all.
        """
        self._take(branch, lambda: branch.make(n, evicted))

    def _take(self, branch: OwnedBranch, action: Callable[[], None]) -> None:
        """Do what needs blocks; where there are none, somebody makes way."""
        while True:
            try:
                return action()
            except PoolExhaustedError as e:
                if e.pool is None or not self._make_way(branch, e.pool):
                    raise

    def _make_way(self, branch: OwnedBranch, pool: BlockPool) -> bool:
        """More blocks for the branch, if possible: from memory while that is plentiful, from the conversation
        that waited longest, from what memory is left, from the answer that began last, if that was later.
        """
        others = [b for b in self._branches if b is not branch and b.holds_blocks and b not in self._in_step]
        idle = [b for b in others if not b.busy]
        if self.memories.grow(pool, 2 if idle else 1):
            return True
        if idle:
            oldest = min(idle, key=lambda b: b.last_used)
            self.makes_way(oldest)
            oldest.free()  # recomputed when its owner speaks again
            return True
        younger = [b for b in others if branch.busy and b.since > branch.since]
        if younger:
            max(younger, key=lambda b: b.since).free()  # recomputed when its next token is asked for
        return bool(younger)

    def wait_for_room(self, branch: OwnedBranch, n: int, cancel: threading.Event | None = None) -> bool:
        """After PoolExhaustedError: give everything back, and wait until there is room for n tokens because
        older answers have ended, or nobody goes on with them. False if it was cancelled meanwhile.
        """
        cancel = cancel or threading.Event()
        clock, since = -1, 0.0
        while not cancel.is_set():
            with self.changing():
                if self.has_room(branch, n):
                    return True
                if clock != self._clock:
                    clock, since = self._clock, time.monotonic()
                elif time.monotonic() - since > PATIENCE_SECONDS:
                    min(self._holders(branch), key=lambda b: b.last_used).free()
                    continue
            cancel.wait(POLL_SECONDS)
        return False

    def has_room(self, branch: OwnedBranch, n: int) -> bool:
        """Whether n tokens find room beside the answers that are being made; the branch gives back what it
        has. Only while `changing`.
        """
        branch.free()
        return self.memories.would_fit(n, self._holders(branch))

    def _holders(self, branch: OwnedBranch) -> list[OwnedBranch]:
        return [b for b in self._branches if b.busy and b is not branch and b.holds_blocks]


_engines: WeakSet[Engine] = WeakSet()
_forks: list[None] = []  # one for each thread that is about to fork
_forking = threading.local()  # `locks`: what a thread that forks holds meanwhile


def _before_fork() -> None:
    """Let steps end: a child made in the middle of one would wait for threads that it does not have."""
    _forking.locks = []
    _forks.append(None)
    engines = list(_engines)
    # A model and a draft of its own layers have one tokenizer: each lock once.
    for lock in dict.fromkeys([e.lock for e in engines] + [e.tokenizer.lock for e in engines]):
        if lock.acquire(timeout=FORK_SECONDS):
            _forking.locks.append(lock)


def _after_fork_in_parent() -> None:
    _forks.pop()
    for lock in reversed(_forking.locks):
        lock.release()


def _after_fork_in_child() -> None:
    _forks.clear()
    for engine in list(_engines):
        engine.forked()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
