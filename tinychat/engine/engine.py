"""One backend and what lives in its KV pool: steps, room for them, and who has to give room up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np

from tinychat.backends.interface import BLOCK, Backend, Slots, Span, Step
from tinychat.base.claims import Claim
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.base.events import Event
from tinychat.engine.eviction import EvictionPolicy, Ledger
from tinychat.engine.generation import Generation
from tinychat.engine.kvcache import BlockPool, Branch, PoolExhaustedError
from tinychat.engine.sampling import SamplingParams, largest_suffice, total_temperature
from tinychat.engine.speculation.speculator import Speculator
from tinychat.text.reasoning import Splitter
from tinychat.text.tokenizer import Tokenizer

T = TypeVar("T")

CHUNK_SECONDS = 0.4  # a prefill chunk aims at this, so that a cancel is felt at once
POLL_SECONDS = 0.05  # an answer that waits for memory looks around this often
YIELD_SECONDS = 0.005  # a step lets a fork go first
FORK_SECONDS = 5.0  # a fork waits for the end of a step, at most so long
PATIENCE_SECONDS = 1.0  # an answer that nobody goes on with for so long gives way to one that waits


class Engine:
    """One backend, its KV pool, and the branches that live there. Steps are serialised; calls may come from
    any thread.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        n_ctx: int,
        trained_context: int | None = None,
        more_tokens: Callable[[], int] = lambda: 0,
    ):
        """n_ctx: tokens that a conversation may hold; the pool begins with room for one that is full.
        trained_context: positions that the model knows; a conversation that evicts never goes beyond them.
        more_tokens: for how many tokens there is memory that the pool does not have yet.
        """
        self.backend, self.tokenizer, self.n_ctx = backend, tokenizer, n_ctx
        self.trained_context = trained_context or n_ctx
        self.more_tokens = more_tokens
        n_blocks = -(-n_ctx // BLOCK) + 2  # copy-on-write of the last block never fails for want of one
        backend.allocate_kv(n_blocks)
        self.pool = BlockPool(n_blocks, backend.copy_block)
        self.lock = threading.RLock()
        self._unfinished = False  # a change of branches: in the making, or interrupted by an exception
        self._branches: WeakSet[OwnedBranch] = WeakSet()
        self._process = os.getpid()
        _engines.add(self)
        self._prefill_rate = 0.0
        self._clock = 0
        self.closed = False

    def branch(self, policy: EvictionPolicy | None = None) -> OwnedBranch:
        """A new, empty sequence. With a policy it may outgrow its budget; without, it ends where the context
        is full.
        """
        return self._known(OwnedBranch(self, policy and Ledger(policy, *self.backend.kv_heads())))

    def _known(self, branch: OwnedBranch) -> OwnedBranch:
        with self.lock:
            self._branches.add(branch)
        return branch

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The lock, for one change of branches. If an exception comes in the middle (Ctrl+C may come
        anywhere), everything is put in order before the next change. Does not nest.
        """
        if self._process != os.getpid() and not getattr(self.backend, "survives_fork", False):
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
        self.pool.rebuild(branch.table for branch in branches)

    def forked(self) -> None:
        """This is a child process: of the threads only the present one is here."""
        self.lock, self.tokenizer.lock = threading.RLock(), threading.Lock()

    def run(
        self,
        branch: Branch,
        ids: Sequence[int],
        first_logit: int,
        params: SamplingParams | None = None,
        accept: Callable[[Any], int] | None = None,
        watched: int | None = None,
        held: int | None = None,
    ) -> Any:
        """Append `ids` to the branch in one step; logits from row `first_logit` on.

        params: how tokens are chosen from the rows. Then they may be what suffices for that: ids where it is
        greedy, or `LargestLogits`, which are to be used before the lock is given back.
        accept: given that output, how many of `ids` stay in the cache; without it all of them do.
        watched: how many of the last rows tell an eviction policy what they attend to; default: all.
        held: tokens that the caller believes to be in the branch.
        Raises PoolExhaustedError if there is no room even after others gave way, or if they are not there
        because the branch gave way.
        """
        with self.changing():
            self._check_open()
            self._clock += 1
            branch.last_used = self._clock
            if held is not None and len(branch) != held:
                raise PoolExhaustedError
            self._make_room(branch, len(ids))
            self.reserve(branch, len(ids))
            stay = accept is None or len(ids) == 1  # the first is no draft
            scores, rows = None, 0
            if branch.ledger and branch.ledger.watches:
                rows = len(ids) if watched is None else watched
                if rows and stay:
                    scores = branch.ledger.tally(len(ids))
                elif rows:
                    scores = np.zeros((rows, *self.backend.kv_heads(), branch.slots + len(ids)), np.float32)
            tokens = np.asarray(ids, dtype=np.int32)
            slots = Slots(branch.block_table(), branch.slots, scores, rows)
            step = Step((Span(tokens, branch.position, first_logit, (slots,)),))
            with branch.rewritten() if rows and stay else nullcontext():  # votes go where they stay
                out = self._step(step, params)
                n = len(ids) if accept is None else accept(out)
                with branch.rewritten() if branch.ledger else nullcontext():
                    branch.commit(ids[:n])
                    if branch.ledger:
                        branch.ledger.append(n, min(rows, n), None if stay else scores)
            return out

    def _step(self, step: Step, params: SamplingParams | None) -> Any:
        if params is None:
            return self.backend.step(step)
        if params.greedy:
            return self.backend.step_greedy(step)
        step_largest = getattr(self.backend, "step_largest", None)
        if step_largest and largest_suffice(params):
            return step_largest(step, total_temperature(params))
        return self.backend.step(step)

    def make_room(self, branch: Branch, n: int) -> None:
        """Evict what n more tokens need, where the branch has a policy; without one, nothing happens."""
        with self.changing():
            self._check_open()
            self._make_room(branch, n)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError("The model is closed.", "Load it again.")

    def _make_room(self, branch: Branch, n: int) -> None:
        ledger = branch.ledger
        if ledger is None:
            return
        excess = branch.slots + n - ledger.policy.budget
        if excess > 0:
            self._take(branch, branch.own)
            table, value = branch.block_table(), None
            if ledger.watches:
                votes = ledger.votes()
                with np.errstate(over="ignore", invalid="ignore"):  # a damaged model's values
                    value = votes * self.backend.value_spread(table, votes)
            with branch.rewritten():
                moves = branch.give_up(-(-excess // BLOCK) * BLOCK, value)
                self.backend.move_slots(table, *moves)
            branch.drop_empty_blocks()
        if branch.position + n > self.trained_context and branch.slots + n <= self.trained_context:
            self._take(branch, branch.own)
            with branch.rewritten():
                self.backend.turn_keys(branch.block_table(), branch.reindex())

    def logits(self, ids: Sequence[int], policy: EvictionPolicy | None = None) -> np.ndarray:
        """float32 [n_tokens, vocab] for every position of `ids`, computed from nothing cached.

        With an eviction policy, in steps of BLOCK tokens, as if they had been drafted: nearly token by token.
        """
        self._check_prompt(ids, policy is not None)
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
    ) -> Iterator[Event]:
        """Continue `prompt` on `branch`. Yields TextDelta for each token, and Done last.

        speculator: drafts tokens that are verified several at a time; the text is the same without it.
        splitter: tells reasoning from the answer; without it all is the answer.
        Raises UsageError before anything is computed if the prompt is empty or leaves no room in the context.
        """
        self._check_prompt(prompt, branch.ledger is not None)
        cancel = cancel or threading.Event()
        generation = Generation(
            self, branch, list(prompt), params, cancel, speculator or Speculator(), splitter
        )
        return self._claimed(branch, generation.events())

    def _claimed(self, branch: OwnedBranch, steps: Iterator[T]) -> Iterator[T]:
        """What `steps` yields. One user of a branch at a time; only older ones that find no room reclaim its
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

    def _check_prompt(self, prompt: Sequence[int], evicts: bool = False) -> None:
        if len(prompt) == 0:
            raise UsageError("The prompt is empty.", "Give at least one character.")
        if len(prompt) > self.n_ctx and not evicts:
            wanted = min(-(-(len(prompt) + 1) // 1024) * 1024, self.trained_context)
            larger = f", or ask for a larger context: --ctx {wanted}" if wanted > len(prompt) else ""
            raise UsageError(
                f"The prompt has {len(prompt)} tokens and the context holds {self.n_ctx}.",
                f"Shorten it{larger}.",
            )

    def chunk_size(self) -> int:
        """Rows of the next prefill chunk: about CHUNK_SECONDS of work, a whole number of blocks."""
        if not self._prefill_rate:
            return min(64, self.backend.max_rows)
        rows = int(self._prefill_rate * CHUNK_SECONDS) // BLOCK * BLOCK
        return max(BLOCK, min(rows, self.backend.max_rows))

    def note_prefill(self, rows: int, seconds: float) -> None:
        """What a chunk took, for the next one's size."""
        self._prefill_rate = rows / max(seconds, 1e-6)

    def kv_bytes(self) -> int:
        """Bytes of the KV pool that hold something."""
        with self.changing():
            return self.pool.used * self.backend.kv_bytes_per_block()

    # Room in the pool

    def reserve(self, branch: OwnedBranch, n: int) -> None:
        """Have room for n more tokens. Raises PoolExhaustedError if others that are busy hold it all."""
        self._take(branch, lambda: branch.reserve(n))

    def _take(self, branch: OwnedBranch, action: Callable[[], None]) -> None:
        """Do what needs blocks; where there are none, somebody makes way."""
        while True:
            try:
                return action()
            except PoolExhaustedError:
                if not self._make_way(branch):
                    raise

    def _make_way(self, branch: OwnedBranch) -> bool:
        """More blocks for the branch, if possible: from memory while that is plentiful, from the conversation
        that waited longest, from what memory is left, from the answer that began last, if that was later.
        """
        others = [b for b in self._branches if b is not branch and b.table]
        idle = [b for b in others if not b.busy]
        if self._grow(2 if idle else 1):
            return True
        if idle:
            min(idle, key=lambda b: b.last_used).free()  # recomputed when its owner speaks again
            return True
        younger = [b for b in others if branch.busy and b.since > branch.since]
        if younger:
            max(younger, key=lambda b: b.since).free()  # recomputed when its next token is asked for
        return bool(younger)

    def _grow(self, part: int) -> bool:
        """Make the pool half as large again, in at most this part of the memory that is free."""
        n = min(self.pool.n_blocks // 2 + 1, self.more_tokens() // BLOCK // part)
        if n <= 0:
            return False
        try:
            self.backend.allocate_kv(self.pool.n_blocks + n)
        except MemoryBudgetError:
            return False
        self.pool.grow(n)
        return True

    def wait_for_room(self, branch: OwnedBranch, n: int, cancel: threading.Event | None = None) -> bool:
        """After PoolExhaustedError: give everything back, and wait until there is room for n tokens because
        older answers have ended, or nobody goes on with them. False if it was cancelled meanwhile.
        """
        cancel = cancel or threading.Event()
        needed = -(-min(n, self.n_ctx) // BLOCK) + 2  # the pool has as many
        clock, since = -1, 0.0
        with self.changing():
            branch.free()
        while not cancel.is_set():
            with self.changing():
                others = [b for b in self._branches if b.busy and b.table and b is not branch]
                if self.pool.n_blocks - len({block for b in others for block in b.table}) >= needed:
                    return True
                if clock != self._clock:
                    clock, since = self._clock, time.monotonic()
                elif time.monotonic() - since > PATIENCE_SECONDS:
                    min(others, key=lambda b: b.last_used).free()
                    continue
            cancel.wait(POLL_SECONDS)
        return False


class OwnedBranch(Branch):
    """A branch that gives its blocks back when its owner is gone."""

    def __init__(self, engine: Engine, ledger: Ledger | None = None):
        super().__init__(engine.pool, ledger=ledger)
        self._engine = engine
        self.last_used = 0
        self.claim = Claim()  # of the answer that is being made
        self.since = 0  # when it began, by the engine's clock

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self.claim.generator is not None

    def _empty(self) -> OwnedBranch:
        return self._engine._known(OwnedBranch(self._engine))

    def __del__(self):
        if self.table:
            self.pool.abandon(self.table)


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
