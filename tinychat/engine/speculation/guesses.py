"""Guesses out of a drafting network's logits, token by token, with the noise that the target draws with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinychat.engine.guide import Guide
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, candidates, greedy, gumbel, masked, sample
from tinychat.engine.speculation import Draft

ANY = 1 << 31  # tokens that nobody has


class Guesses:
    """What was guessed so far behind a context.

    At temperature 0 it is the argmax. Otherwise it is drawn with the target's noise (the coupled rule of
    docs/speculation.md), so that a guess is right whenever the two distributions lead the same noise to the
    same token.
    """

    def __init__(
        self,
        context: Sequence[int],
        answer: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None,
        eos_ids: frozenset[int] | set[int],
        keep_distributions: bool = False,
        vocab: int = ANY,
    ):
        """answer: where in the context the answer begins, for penalties: it costs guesses to be wrong.
        vocab: tokens that target and network both have; what others would follow is not guessed.
        """
        self.context, self.answer, self.params, self.seed = context, answer, params, seed
        self.eos_ids = eos_ids
        self.guide = guide.fork() if guide is not None else None
        self.keep_distributions, self.vocab = keep_distributions, vocab
        self.draft = Draft([])

    @property
    def masked(self) -> bool:
        """Whether whole rows of logits are wanted, whatever the settings."""
        return self.guide is not None and self.guide.reads

    def take(self, row: Any) -> int | None:
        """The token that follows those so far, from its row of logits (or its argmax). None: nothing can be
        guessed behind it.
        """
        due = self.guide.next() if self.guide is not None else None
        token = due if isinstance(due, int) else self._choose(row, due)
        if token >= self.vocab:
            return None
        self.draft.tokens.append(token)
        if self.guide is not None:
            if token in self.eos_ids:
                return None
            self.guide.push(token)
            if self.guide.finished:
                return None
        return token

    def _choose(self, row: Any, allowed: np.ndarray | None) -> int:
        params, draft = self.params, self.draft
        penalties = Penalties.of(params, row, self.context, draft.tokens, self.answer)
        if allowed is not None:
            row = masked(row, allowed)
        elif params.greedy:
            return greedy(row)
        position = len(self.context) + len(draft.tokens)
        if params.temperature == 0 or not self.keep_distributions:
            return sample(row, params, self.seed, position, penalties)
        ids, p = candidates(row, params, penalties)
        draft.distributions.append((ids, p))
        # Rejection wants a draw that is independent of the target's own noise.
        return int(ids[np.argmax(np.log(p) + gumbel(self.seed ^ 0x5DEECE66D, position, ids))])
