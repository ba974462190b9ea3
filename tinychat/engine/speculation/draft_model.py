"""A small model drafts for a large one: its own KV cache, the same engine, the same noise."""

from __future__ import annotations

from collections.abc import Sequence

from tinychat.base.errors import CheckpointError, UsageError
from tinychat.engine.engine import Engine
from tinychat.engine.guide import Guide
from tinychat.engine.memory.branch import Branch, common_prefix
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.guesses import ANY, Guesses
from tinychat.text.tokenizer import Tokenizer


class DraftModel:
    """Drafts with the model of `engine`."""

    slow = True

    def __init__(
        self, engine: Engine, name: str = "draft", keep_distributions: bool = False, vocab: int = ANY
    ):
        """vocab: tokens that both models have; what comes after one that they do not is not drafted."""
        self.vocab = vocab
        self.engine, self.name, self.keep_distributions = engine, name, keep_distributions
        self._branch = engine.branch()
        self._answer = 0  # where in the context it begins: where penalties count from

    def begin(self, context: Sequence[int], branch: Branch) -> None:
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
        eos_ids = self.engine.tokenizer.eos_ids
        guesses = Guesses(
            context, self._answer, params, seed, guide, eos_ids, self.keep_distributions, self.vocab
        )
        try:
            with self.engine.lock:  # drafts of other conversations may want the blocks
                self._draft(guesses, context, k)
        except (PoolExhaustedError, CheckpointError):  # no room, or a draft whose weights are damaged
            pass  # fewer drafts, the same text
        return guesses.draft

    def _draft(self, guesses: Guesses, context: Sequence[int], k: int) -> None:
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
            masked = guesses.masked
            token = guesses.take(
                self.engine.run(branch, todo, len(todo) - 1, guesses.params, masked=masked)[0]
            )
            if token is None:
                break
            todo = [token]


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
