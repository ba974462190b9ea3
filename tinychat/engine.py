"""One backend and what lives in its KV pool: steps, room for them, and who has to give room up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import numpy as np

from tinychat.backends import BLOCK, Backend, Step
from tinychat.errors import MemoryBudgetError, UsageError
from tinychat.events import Event
from tinychat.eviction import EvictionPolicy, Ledger
from tinychat.generation import Generation
from tinychat.kvcache import BlockPool, Branch, PoolExhaustedError
from tinychat.machine import human_bytes
from tinychat.reasoning import Splitter
from tinychat.sampling import SamplingParams, largest_suffice, total_temperature
from tinychat.speculation.speculator import Speculator
from tinychat.tokenizer import Tokenizer

CHUNK_SECONDS = 0.4  # a prefill chunk aims at this, so that a cancel is felt at once


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
        spare: int = 0,
    ):
        """n_ctx: tokens that the pool has room for. trained_context: positions that the model knows; a
        conversation that evicts never goes beyond them. spare: blocks beside, for what such a conversation
        was before its last answer.
        """
        self.backend, self.tokenizer, self.n_ctx = backend, tokenizer, n_ctx
        self.trained_context = trained_context or n_ctx
        n_blocks = -(-n_ctx // BLOCK) + 2  # copy-on-write of the last block never fails for want of one
        backend.allocate_kv(n_blocks + spare)
        self.pool = BlockPool(n_blocks + spare, backend.copy_block, spare)
        self.lock = threading.RLock()
        self._branches: WeakSet[OwnedBranch] = WeakSet()
        self.orphans: deque[list[int]] = deque()
        self._prefill_rate = 0.0
        self._clock = 0
        self._closed = False

    def branch(self, policy: EvictionPolicy | None = None) -> OwnedBranch:
        """A new, empty sequence. With a policy it may outgrow its budget; without, it ends where the context
        is full.
        """
        return self._known(OwnedBranch(self, policy and Ledger(policy, *self.backend.kv_heads())))

    def _known(self, branch: OwnedBranch) -> OwnedBranch:
        with self.lock:
            self._branches.add(branch)
        return branch

    def run(
        self,
        branch: Branch,
        ids: Sequence[int],
        first_logit: int,
        params: SamplingParams | None = None,
        accept: Callable[[Any], int] | None = None,
        watched: int | None = None,
    ) -> Any:
        """Append `ids` to the branch in one step; logits from row `first_logit` on.

        params: how tokens are chosen from the rows. Then they may be what suffices for that: ids where it is
        greedy, or `LargestLogits`, which are to be used before the lock is given back.
        accept: given that output, how many of `ids` stay in the cache; without it all of them do.
        watched: how many of the last rows tell an eviction policy what they attend to; default: all.
        Raises PoolExhaustedError if there is no room even after idle branches gave theirs.
        """
        with self.lock:
            if self._closed:
                raise UsageError("The model is closed.", "Load it again.")
            self._clock += 1
            branch.last_used = self._clock
            self.make_room(branch, len(ids))
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
            step = Step(
                tokens, branch.position, branch.slots, branch.block_table(), first_logit, scores, rows
            )
            with branch.rewritten() if rows and stay else nullcontext():  # votes go where they stay
                out = self._step(step, params)
                n = len(ids) if accept is None else accept(out)
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
        ledger = branch.ledger
        if ledger is None:
            return
        with self.lock:
            excess = branch.slots + n - ledger.policy.budget
            if excess > 0:
                self._freeing(branch, branch.own)
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
                self._freeing(branch, branch.own)
                with branch.rewritten():
                    self.backend.turn_keys(branch.block_table(), branch.reindex())

    def logits(self, ids: Sequence[int], policy: EvictionPolicy | None = None) -> np.ndarray:
        """float32 [n_tokens, vocab] for every position of `ids`, computed from nothing cached.

        With an eviction policy, in steps of BLOCK tokens, as if they had been drafted: nearly token by token.
        """
        self._check_prompt(ids, policy is not None)
        branch, chunk = self.branch(policy), BLOCK if policy else self.backend.max_rows
        try:
            with self._held(branch):
                parts = [self.run(branch, ids[i : i + chunk], 0) for i in range(0, len(ids), chunk)]
            return np.concatenate(parts)
        except PoolExhaustedError:
            raise self.pool_too_small(len(ids)) from None
        finally:
            branch.free()

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
        return self._guarded(branch, generation)

    def _guarded(self, branch: OwnedBranch, generation: Generation) -> Iterator[Event]:
        with self._held(branch):
            yield from generation.events()

    @contextmanager
    def _held(self, branch: OwnedBranch) -> Iterator[None]:
        """One user at a time; nobody reclaims its blocks meanwhile."""
        with self.lock:
            if branch.busy:
                raise UsageError(
                    "This conversation is still answering.", "Cancel it, or wait for its last event."
                )
            branch.busy = True
        try:
            yield
        finally:
            branch.busy = False

    def close(self) -> None:
        """Refuse every later step, and release the backend once the present one is done. Idempotent."""
        with self.lock:
            self._closed = True
            self.backend.close()

    def pool_too_small(self, n: int) -> MemoryBudgetError:
        """What to say when n tokens find no room in the pool."""
        return MemoryBudgetError(
            f"The KV cache ({human_bytes(self.kv_bytes())}) cannot hold {n} tokens.",
            "Close another session, or load the model with a larger ctx.",
        )

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
        return self.pool.used * self.backend.kv_bytes_per_block()

    def reserve(self, branch: Branch, n: int) -> None:
        """Have room for n more tokens. Raises PoolExhaustedError if others that are busy hold it all."""
        while self.orphans:
            for block in reversed(self.orphans.popleft()):
                self.pool.release(block)
        self._freeing(branch, lambda: branch.reserve(n))

    def _freeing(self, branch: Branch, action: Callable[[], None]) -> None:
        """Do what needs blocks; where there are none, the branch that waited longest gives its own."""
        while True:
            try:
                return action()
            except PoolExhaustedError:
                others = [b for b in self._branches if b is not branch and b.table and not b.busy]
                if not others:
                    raise
                min(others, key=lambda b: b.last_used).free()  # recomputed when its owner speaks again


class OwnedBranch(Branch):
    """A branch that gives its blocks back when its owner is gone."""

    def __init__(self, engine: Engine, ledger: Ledger | None = None):
        super().__init__(engine.pool, ledger=ledger)
        self._engine = engine
        self._orphans = engine.orphans
        self.last_used = 0
        self.busy = False

    def _empty(self) -> OwnedBranch:
        return self._engine._known(OwnedBranch(self._engine))

    def __del__(self):
        # May run in any thread, in the middle of anything: only leave the blocks where the engine finds them.
        if self.table:
            self._orphans.append(self.table)
