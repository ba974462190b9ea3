"""The engine loop: match the prefix, prefill in chunks, decode token by token, and say what happens as it
happens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from weakref import WeakSet

import numpy as np

from tinychat.backends import BLOCK, Backend, Step
from tinychat.errors import MemoryBudgetError, UsageError
from tinychat.events import Completion, Done, Event, FinishReason, Stats, TextDelta
from tinychat.kvcache import BlockPool, Branch, PoolExhaustedError
from tinychat.machine import human_bytes, peak_rss
from tinychat.sampling import SamplingParams, choose_seed, sample
from tinychat.stopping import StopMatcher
from tinychat.tokenizer import StreamDecoder, Tokenizer

CHUNK_SECONDS = 0.4  # a prefill chunk aims at this, so that a cancel is felt at once


class Engine:
    """One backend, its KV pool, and the branches that live there. Steps are serialised; calls may come from
    any thread.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, n_ctx: int):
        self.backend, self.tokenizer, self.n_ctx = backend, tokenizer, n_ctx
        n_blocks = -(-n_ctx // BLOCK) + 2  # copy-on-write of the last block never fails for want of one
        backend.allocate_kv(n_blocks)
        self.pool = BlockPool(n_blocks, backend.copy_block)
        self.lock = threading.RLock()
        self._branches: WeakSet[_OwnedBranch] = WeakSet()
        self.orphans: deque[list[int]] = deque()
        self._prefill_rate = 0.0
        self._clock = 0

    def branch(self) -> _OwnedBranch:
        """A new, empty sequence."""
        with self.lock:
            b = _OwnedBranch(self)
            self._branches.add(b)
            return b

    def run(
        self, branch: Branch, ids: Sequence[int], first_logit: int, step_greedy: bool = False
    ) -> np.ndarray:
        """Append `ids` to the branch in one step; logits (or argmax) from row `first_logit` on.

        Raises PoolExhaustedError if there is no room even after idle branches gave theirs.
        """
        with self.lock:
            self._clock += 1
            branch.last_used = self._clock
            self._reserve(branch, len(ids))
            step = Step(
                np.asarray(ids, dtype=np.int32), len(branch), len(branch), branch.block_table(), first_logit
            )
            out = self.backend.step_greedy(step) if step_greedy else self.backend.step(step)
            branch.commit(ids)
            return out

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [n_tokens, vocab] for every position of `ids`, computed from nothing cached."""
        self._check_prompt(ids)
        branch = self.branch()
        try:
            chunk = self.backend.max_rows
            return np.concatenate(
                [self.run(branch, ids[i : i + chunk], 0) for i in range(0, len(ids), chunk)]
            )
        finally:
            branch.free()

    def generate(
        self,
        branch: Branch,
        prompt: Sequence[int],
        params: SamplingParams,
        cancel: threading.Event | None = None,
    ) -> Iterator[Event]:
        """Continue `prompt` on `branch`. Yields TextDelta for each token, and Done last.

        Raises UsageError before anything is computed if the prompt is empty or leaves no room in the context.
        """
        self._check_prompt(prompt)
        if branch.busy:
            raise UsageError(
                "This conversation is still answering.", "Cancel it, or wait for its last event."
            )
        return self._guarded(branch, list(prompt), params, cancel or threading.Event())

    def _guarded(self, branch, prompt, params, cancel) -> Iterator[Event]:
        branch.busy = True  # nobody reclaims its blocks meanwhile
        try:
            yield from _Generation(self, branch, prompt, params, cancel).events()
        finally:
            branch.busy = False

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if len(prompt) == 0:
            raise UsageError("The prompt is empty.", "Give at least one character.")
        if len(prompt) > self.n_ctx:
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

    def _reserve(self, branch: Branch, n: int) -> None:
        while self.orphans:
            for block in reversed(self.orphans.popleft()):
                self.pool.release(block)
        while True:
            try:
                return branch.reserve(n)
            except PoolExhaustedError:
                others = [b for b in self._branches if b is not branch and b.table and not b.busy]
                if not others:
                    raise
                min(others, key=lambda b: b.last_used).free()  # recomputed when its owner speaks again


class _OwnedBranch(Branch):
    """A branch that gives its blocks back when its owner is gone."""

    def __init__(self, engine: Engine):
        super().__init__(engine.pool)
        self._orphans = engine.orphans
        self.last_used = 0
        self.busy = False

    def __del__(self):
        # May run in any thread, in the middle of anything: only leave the blocks where the engine finds them.
        if self.table:
            self._orphans.append(self.table)


class _Generation:
    """The state of one answer."""

    def __init__(self, engine: Engine, branch: Branch, prompt: list[int], params: SamplingParams, cancel):
        self.engine, self.branch, self.prompt, self.params, self.cancel = (
            engine,
            branch,
            prompt,
            params,
            cancel,
        )
        self.decoder = StreamDecoder(engine.tokenizer, continued=True)
        self.matcher = StopMatcher(params.stop)
        self.seed = choose_seed(params)
        self.ids: list[int] = []
        self.chosen = 0  # the stop token counts as a step too
        self.text: list[str] = []
        self.stats = Stats(prompt_tokens=len(prompt))
        self.seen = np.zeros(0, dtype=np.int64)
        if params.repeat_penalty != 1.0:
            self.seen = np.unique(np.asarray(prompt, dtype=np.int64))

    def events(self) -> Iterator[Event]:
        began = time.perf_counter()
        out = self._prefill()
        if out is None:
            yield self._done("cancelled", began, began)
            return
        first = last = time.perf_counter()
        self.stats.ttft_s = first - began
        reason: FinishReason = "length"
        while self._may_continue():
            token = self._choose(out)
            self.chosen += 1
            last = time.perf_counter()
            if token in self.engine.tokenizer.eos_ids:
                reason = "stop"
                break
            self.ids.append(token)
            text = self.matcher.push(self.decoder.push(token))
            self.text.append(text)
            yield TextDelta(text, token)
            if self.matcher.matched is not None:
                reason = "stop"
                break
            if not self._may_continue():
                break
            if self.cancel.is_set():
                reason = "cancelled"
                break
            if len(self.prompt) + len(self.ids) > self.engine.n_ctx:
                reason = "context_full"
                break
            try:
                out = self.engine.run(self.branch, [token], 0, self.params.greedy)
            except PoolExhaustedError:
                reason = "context_full"
                break
        rest = self.matcher.push(self.decoder.flush()) + self.matcher.flush()
        if self.matcher.matched is not None:
            reason = "stop"
        if rest:
            self.text.append(rest)
            yield TextDelta(rest, None)
        yield self._done(reason, first, last)

    def _may_continue(self) -> bool:
        return self.params.max_tokens is None or len(self.ids) < self.params.max_tokens

    def _prefill(self):
        """Fill the cache with the prompt; the last row's logits (or argmax), or None if cancelled."""
        engine, branch = self.engine, self.branch
        with engine.lock:
            # The last token always runs: its logits are what comes next.
            cached = branch.match(self.prompt[:-1])
        self.stats.cached_tokens = cached
        began, at = time.perf_counter(), cached
        while True:
            if self.cancel.is_set():
                return None
            chunk = self.prompt[at : at + engine.chunk_size()]
            last = at + len(chunk) == len(self.prompt)
            start = time.perf_counter()
            try:
                out = engine.run(branch, chunk, len(chunk) - last, self.params.greedy)
            except PoolExhaustedError:
                raise MemoryBudgetError(
                    f"The KV cache ({human_bytes(engine.kv_bytes())}) cannot hold {len(self.prompt)} tokens.",
                    "Close another session, or load the model with a larger ctx.",
                ) from None
            if len(chunk) >= BLOCK:
                engine.note_prefill(len(chunk), time.perf_counter() - start)
            at += len(chunk)
            if last:
                self.stats.prefill_tps = (at - cached) / max(time.perf_counter() - began, 1e-9)
                return out

    def _choose(self, out: np.ndarray) -> int:
        if self.params.greedy:
            return int(out[0])
        position = len(self.prompt) + len(self.ids)
        seen = self.seen
        if self.params.repeat_penalty != 1.0 and self.ids:
            self.seen = seen = np.union1d(seen, self.ids[-1:])
        return sample(out[0], self.params, self.seed, position, seen)

    def _done(self, reason: FinishReason, first: float, last: float) -> Done:
        s = self.stats
        text = "".join(self.text)
        ids = self.ids
        if self.matcher.matched is not None:
            ids = cut_ids(self.engine.tokenizer, ids, text)
        s.generated_tokens = len(self.ids)
        if self.chosen > 1:
            s.tpot_s = (last - first) / (self.chosen - 1)
            s.decode_tps = 1 / s.tpot_s if s.tpot_s else 0.0
        s.kv_bytes = self.engine.kv_bytes()
        s.peak_rss_bytes = peak_rss()
        return Done(reason, s, Completion(text, ids, reason, s))


def cut_ids(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """The ids of an answer that a stop string cut to `text`: kept as generated up to the cut, re-encoded
    across it.
    """
    for n in range(len(ids), -1, -1):
        head = tokenizer.decode(ids[:n], continued=True)
        if text.startswith(head):
            return ids[:n] + tokenizer.encode(text[len(head) :])
    return tokenizer.encode(text)
