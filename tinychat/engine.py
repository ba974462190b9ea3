"""The engine loop: match the prefix, prefill in chunks, decode token by token, and say what happens as it
happens.
"""

from __future__ import annotations

import io
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import numpy as np

from tinychat.backends import BLOCK, Backend, Step
from tinychat.errors import MemoryBudgetError, UsageError
from tinychat.events import Completion, Done, Event, FinishReason, Notice, Stats, TextDelta
from tinychat.eviction import EvictionPolicy, Ledger, Votes
from tinychat.kvcache import BlockPool, Branch, PoolExhaustedError
from tinychat.machine import human_bytes, peak_rss
from tinychat.sampling import SamplingParams, choose_seed, largest_suffice, sample, total_temperature
from tinychat.speculation import Draft
from tinychat.speculation.acceptance import rejection
from tinychat.speculation.speculator import Speculator
from tinychat.stopping import StopMatcher, cut_ids
from tinychat.tokenizer import StreamDecoder, Tokenizer

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
                rows = branch.ledger.policy.voting(branch.slots, len(ids))
                rows = rows if watched is None else min(rows, watched)
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
                    voted = max(0, rows - (len(ids) - n))
                    branch.ledger.append(n, voted, None if stay else scores)
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
                table = branch.block_table()
                with branch.rewritten():
                    self.backend.move_slots(table, *branch.give_up(-(-excess // BLOCK) * BLOCK))
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
    ) -> Iterator[Event]:
        """Continue `prompt` on `branch`. Yields TextDelta for each token, and Done last.

        speculator: drafts tokens that are verified several at a time; the text is the same without it.
        Raises UsageError before anything is computed if the prompt is empty or leaves no room in the context.
        """
        self._check_prompt(prompt, branch.ledger is not None)
        cancel = cancel or threading.Event()
        generation = _Generation(self, branch, list(prompt), params, cancel, speculator or Speculator())
        return self._guarded(branch, generation)

    def _guarded(self, branch: OwnedBranch, generation: _Generation) -> Iterator[Event]:
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
            raise UsageError(
                f"The prompt has {len(prompt)} tokens and the context holds {self.n_ctx}.",
                f"Shorten it, or ask for a larger context: --ctx {-(-len(prompt) // 1024) * 1024}.",
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


class _Generation:
    """The state of one answer."""

    def __init__(
        self,
        engine: Engine,
        branch: Branch,
        prompt: list[int],
        params: SamplingParams,
        cancel: threading.Event,
        speculator: Speculator,
    ):
        self.engine, self.branch, self.speculator = engine, branch, speculator
        self.prompt, self.cancel = prompt, cancel
        if params.max_tokens is None and branch.ledger:
            # Nothing else would end an answer that runs in circles.
            params = params.but(max_tokens=engine.n_ctx)
        self.params = params
        self.context = array("i", prompt)  # and the answer's tokens so far; it may have no end
        self.decoder = StreamDecoder(engine.tokenizer, continued=True)
        self.matcher = StopMatcher(params.stop)
        self.seed = choose_seed(params)
        self.seen: set[int] = set()  # the first n_seen of the context, where they are penalized
        self.n_seen = 0
        self.evicted_before = branch.evicted
        self.notices: list[str] = []
        self.ids = array("i")
        self.steps = self.decided = 0  # decode steps, and the tokens that they decided
        self.chosen = 0  # the stop token counts as a step too
        self.text = io.StringIO()
        self.stats = Stats(prompt_tokens=len(prompt))

    def events(self) -> Iterator[Event]:
        """Prefill, then a TextDelta a token, then Done."""
        began = time.perf_counter()
        first_token = self._prefill()
        yield from self._take_notices()
        if first_token is None:
            yield self._done("cancelled", began, began)
            return
        first = last = time.perf_counter()
        self.stats.ttft_s = first - began
        reason: FinishReason = "length"
        tokens = self._tokens(first_token)
        while self._may_continue():
            token = next(tokens, None)
            yield from self._take_notices()
            if token is None:
                reason = "context_full"
                break
            self.chosen += 1
            last = time.perf_counter()
            if token in self.engine.tokenizer.eos_ids:
                reason = "stop"
                break
            self.ids.append(token)
            text = self.matcher.push(self.decoder.push(token))
            self.text.write(text)
            yield TextDelta(text, token)
            if self.matcher.matched is not None:
                reason = "stop"
                break
            if self.cancel.is_set() and self._may_continue():
                reason = "cancelled"
                break
        rest = self.matcher.push(self.decoder.flush()) + self.matcher.flush()
        if self.matcher.matched is not None:
            reason = "stop"
        if rest:
            self.text.write(rest)
            yield TextDelta(rest, None)
        yield self._done(reason, first, last)

    def _tokens(self, first: int) -> Iterator[int]:
        """The answer's tokens; ends when the context is full.

        The next step runs when the next token is asked for.
        """
        decided = [first]
        self.speculator.begin(self.context)
        while True:
            for token in decided:
                yield token
                self.context.append(token)
            room = self._room()
            if room < 0:
                return
            if self.params.max_tokens is not None:
                room = min(room, self.params.max_tokens - len(self.ids) - 1)
            room = min(room, self.engine.backend.max_rows - 1)
            draft = self.speculator.propose(self.context, room, self.params, self.seed)
            began = time.perf_counter()
            decided = []

            def accept(out, draft=draft, decided=decided) -> int:
                decided += self._verify(out, draft)
                return len(decided)

            rows = [self.context[-1], *draft.tokens]
            try:
                self.engine.run(self.branch, rows, 0, self.params, accept)
            except PoolExhaustedError:
                return
            kept = len(decided) - 1
            self.speculator.note(kept, time.perf_counter() - began)
            self.stats.drafted_tokens += len(draft.tokens)
            self.stats.accepted_tokens += kept
            self.steps += 1
            self.decided += len(decided)

    def _take_notices(self) -> Iterator[Notice]:
        if self.branch.evicted and not self.evicted_before:
            self.evicted_before = self.branch.evicted
            policy = self.branch.ledger.policy
            who = "what the model attends to least is" if policy.name == "h2o" else "the oldest are"
            yield Notice(f"The KV cache's {policy.budget} tokens are full: from here on {who} given up.")
        if notice := self.speculator.take_notice():
            yield Notice(notice)
        while self.notices:
            yield Notice(self.notices.pop(0))

    def _room(self) -> int:
        """Tokens that fit behind the one of the next step; negative when the context is full."""
        branch = self.branch
        if branch.ledger is None:
            return self.engine.n_ctx - len(branch) - 1
        # A window never crosses an eviction: what is given up must not depend on how many were drafted.
        left = branch.ledger.policy.budget - branch.slots
        room = (left or BLOCK) - 1
        left = self.engine.trained_context - branch.position
        return min(room, left - 1) if left > 0 else room

    def _verify(self, out: np.ndarray, draft: Draft) -> list[int]:
        """What a window decides: the accepted drafts, then the first that differs, or one more after them
        all.
        """
        decided: list[int] = []
        for i, row in enumerate(out):
            drafted = draft.tokens[i] if i < len(draft.tokens) else None
            q = draft.distributions[i] if drafted is not None and draft.distributions else None
            decided.append(self._choose(row, drafted, q, decided))
            if decided[-1] != drafted or drafted in self.engine.tokenizer.eos_ids:
                break
        return decided

    def _may_continue(self) -> bool:
        return self.params.max_tokens is None or len(self.ids) < self.params.max_tokens

    def _prefill(self) -> int | None:
        """Fill the cache with the prompt; the token that follows it, or None if cancelled."""
        engine, branch = self.engine, self.branch
        if self.cancel.is_set():
            return None
        with engine.lock:
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
        if not again:
            return self._read(cached)
        with branch.rewritten():  # until `recall` it holds what the answer before voted
            return self._read(cached, again)

    def _read(self, at: int, again: Votes | None = None) -> int | None:
        """The prompt from token `at` on; `again`: its last token, which has voted already."""
        engine, branch = self.engine, self.branch
        began, cached = time.perf_counter(), at
        while True:
            if self.cancel.is_set() and not again:
                return None
            size, watched = engine.chunk_size(), None
            start = time.perf_counter()
            try:
                if branch.ledger:
                    size, watched = self._part_of_chunk(at, size)
                    watched = 0 if again else watched
                chunk = self.prompt[at : at + size]
                last = at + len(chunk) == len(self.prompt)
                with engine.lock:
                    out = engine.run(branch, chunk, len(chunk) - last, self.params, watched=watched)
                    token = self._choose(out[0], None) if last else None
            except PoolExhaustedError:
                raise engine.pool_too_small(len(self.prompt)) from None
            if len(chunk) >= BLOCK:
                engine.note_prefill(len(chunk), time.perf_counter() - start)
            at += len(chunk)
            if last:
                if branch.ledger:
                    branch.ledger.recall(again) if again else branch.ledger.remember()
                self.stats.prefill_tps = (at - cached) / max(time.perf_counter() - began, 1e-9)
                return token

    def _part_of_chunk(self, at: int, size: int) -> tuple[int, int]:
        """Where eviction may come, prompts have chunks of a constant size, and fixed queries vote.

        Makes room for the rest of the chunk that token `at` lies in. Returns how many tokens to run now,
        `size` at most, and how many of them vote.
        """
        policy, n = self.branch.ledger.policy, len(self.prompt)
        end = policy.chunk_end(at, n)
        self.engine.make_room(self.branch, end - at)
        voters = policy.voters(end, self.branch.slots + end - at, n)
        size = min(size, end - at)
        return size, max(0, min(size, at + size - (end - voters)))

    def _choose(self, row, drafted: int | None, q=None, before: Sequence[int] = ()) -> int:
        """The token that follows the context and `before`, from its row of logits (or its argmax)."""
        if self.params.greedy:
            return int(row)
        position = len(self.context) + len(before)
        seen = None
        if self.params.repeat_penalty != 1.0:
            self.seen.update(self.context[self.n_seen :])
            self.n_seen = len(self.context)
            seen = np.sort(np.fromiter(self.seen.union(before), np.int64))
        if drafted is not None and self.speculator.rule == "rejection":
            return rejection(row, drafted, q, self.params, self.seed, position, seen)
        return sample(row, self.params, self.seed, position, seen)

    def _done(self, reason: FinishReason, first: float, last: float) -> Done:
        s = self.stats
        text, ids = self.text.getvalue(), self.ids.tolist()
        if self.matcher.matched is not None:
            ids = cut_ids(self.engine.tokenizer, ids, text)
        s.generated_tokens = len(self.ids)
        if self.chosen > 1:
            s.tpot_s = (last - first) / (self.chosen - 1)
            s.decode_tps = 1 / s.tpot_s if s.tpot_s else 0.0
        if self.steps:
            s.tokens_per_step = self.decided / self.steps
            s.draft_speedup = self.speculator.speed_up()
        s.kv_bytes = self.engine.kv_bytes()
        s.evicted_tokens = self.branch.evicted
        s.peak_rss_bytes = peak_rss()
        return Done(reason, s, Completion(text, ids, reason, s))
