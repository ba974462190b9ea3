"""A small model drafts for a large one: its own KV cache, the same engine, the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinychat.base.errors import CheckpointError, UsageError
from tinychat.engine.engine import Engine
from tinychat.engine.guide import Guide
from tinychat.engine.memory.branch import common_prefix
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, candidates, greedy, gumbel, masked, sample
from tinychat.engine.speculation import Draft
from tinychat.text.tokenizer import Tokenizer


class DraftModel:
    """Drafts with the model of `engine`.

    At temperature 0 it takes its argmax. Otherwise it draws with the target's noise (the coupled rule of
    docs/design.md), so that it guesses right whenever the two distributions lead the same noise to the same
    token.
    """

    def __init__(
        self, engine: Engine, name: str = "draft", keep_distributions: bool = False, vocab: int = 1 << 31
    ):
        """vocab: tokens that both models have; what comes after one that they do not is not drafted."""
        self.vocab = vocab
        self.engine, self.name, self.keep_distributions = engine, name, keep_distributions
        self._branch = engine.branch()
        self._answer = (
            0  # index of the answer's first token: for penalties, where it costs guesses to be wrong
        )

    def begin(self, context: Sequence[int]) -> None:
        """Keep what the cache shares with `context`; the rest is computed with the first draft."""
        self._answer = len(context)
        with self.engine.changing():
            self._branch.match(context[:-1])

    def propose(
        self,
        context: Sequence[int],
        k: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None = None,
    ) -> Draft:
        """k tokens, one step of the draft model each; fewer when its context is full."""
        draft = Draft([])
        guide = guide.fork() if guide is not None else None
        try:
            with self.engine.lock:  # drafts of other conversations may want the blocks
                self._draft(draft, context, k, params, seed, guide)
        except (PoolExhaustedError, CheckpointError):  # no room, or a draft whose weights are damaged
            pass  # fewer drafts, the same text
        return draft

    def _draft(
        self,
        draft: Draft,
        context: Sequence[int],
        k: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None,
    ) -> None:
        branch = self._branch
        # Only the end can differ from the last time: what was drafted and not accepted.
        start = max(0, min(len(branch), len(context)) - 64)
        same = start + common_prefix(branch.ids[start:], context[start:])
        with self.engine.changing():
            branch.truncate(min(same, len(context) - 1))
        todo = list(context[len(branch) :])
        if max(todo) >= self.vocab:
            return
        while len(todo) > self.engine.backend.max_rows:
            chunk, todo = todo[: self.engine.backend.max_rows], todo[self.engine.backend.max_rows :]
            self.engine.run(branch, chunk, len(chunk))
        for _ in range(k):
            if len(branch) + len(todo) > self.engine.n_ctx:
                break
            masks = guide is not None and guide.reads
            row = self.engine.run(branch, todo, len(todo) - 1, params, masked=masks)[0]
            due = guide.next() if guide is not None else None
            todo = [due if isinstance(due, int) else self._choose(row, context, draft, params, seed, due)]
            if todo[0] >= self.vocab:
                break
            draft.tokens += todo
            if guide is not None:
                if todo[0] in self.engine.tokenizer.eos_ids:
                    break
                guide.push(todo[0])
                if guide.finished:
                    break

    def _choose(
        self, row, context, draft: Draft, params: SamplingParams, seed: int, allowed: np.ndarray | None
    ) -> int:
        penalties = Penalties.of(params, row, context, draft.tokens, self._answer)
        if allowed is not None:
            row = masked(row, allowed)
        elif params.greedy:
            return greedy(row)
        position = len(context) + len(draft.tokens)
        if params.temperature == 0 or not self.keep_distributions:
            return sample(row, params, seed, position, penalties)
        ids, p = candidates(row, params, penalties)
        draft.distributions.append((ids, p))
        # Rejection wants a draw that is independent of the target's own noise.
        return int(ids[np.argmax(np.log(p) + gumbel(seed ^ 0x5DEECE66D, position, ids))])


def check_vocabulary(target: Tokenizer, draft: Tokenizer, shown: int = 5) -> None:
    """Refuse a draft whose tokens mean something else; padding at the vocabulary's end may differ.

    Raises UsageError naming the first pairs that differ.
    """
    n = min(target.vocab_size, draft.vocab_size)
    different = [i for i in range(n) if target.token_bytes(i) != draft.token_bytes(i)]
    if different:
        pairs = ", ".join(
            f"{i}: {target.token_bytes(i)!r} / {draft.token_bytes(i)!r}" for i in different[:shown]
        )
        raise UsageError(
            f"The draft's tokenizer differs from the model's in {len(different)} of {n} tokens ({pairs}).",
            "Use a draft model of the same family.",
        )
    longer = target if target.vocab_size > n else draft
    extra = [i for i in range(n, longer.vocab_size) if longer.token_bytes(i)]
    if len(extra) > 1024:
        raise UsageError(
            f"The vocabularies differ in size: {target.vocab_size} and {draft.vocab_size} tokens.",
            "Use a draft model of the same family.",
        )
