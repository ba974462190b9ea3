"""Drafts by the layer that predicts further, the model's own or a head's: on the model's branch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import ref

from tinychat.backends.interface import Step, state_place
from tinychat.base.errors import CheckpointError
from tinychat.engine.guide import Guide
from tinychat.engine.memory.ahead import Ahead, ahead
from tinychat.engine.memory.branch import Branch
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.guesses import Guesses
from tinychat.engine.wishes import Home
from tinychat.network import further

LOOKED_AT = 128  # last tokens of a text


def few_suffice(ids: Sequence[int]) -> bool:
    """Whether a text that goes on like these tokens hardly has other ids than the most frequent ones."""
    return sum(i >= further.FEW for i in ids) * 16 <= len(ids)


class FurtherLayer:
    """Every step of the model leaves on its branch what the layer goes on from. So it follows the branch
    wherever that goes, and a draft begins with nothing to read.
    """

    slow = True

    def __init__(self, engine: Home, name: str = "mtp"):
        self.engine, self.name = engine, name
        self._branch: ref[Branch] | None = None
        self._answer, self._few = 0, False  # where in the context it begins; whether few ids suffice
        memories = engine.backend.memories
        last = max(max(spec.layers) for spec in memories if spec.kind == "state")
        self._memory, _ = state_place(memories, last)  # of its hidden state

    def begin(self, context: Sequence[int], branch: Branch) -> None:
        """Draft behind this branch."""
        self._branch, self._answer = ref(branch), len(context)

    def propose(
        self,
        context: Sequence[int],
        k: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None = None,
    ) -> Draft:
        """k tokens, a row of the layer each; none while the branch has given way, before it has a token, or
        where there is no room.
        """
        branch, engine = self._branch() if self._branch is not None else None, self.engine
        guesses = Guesses(context, self._answer, params, seed, guide, engine.tokenizer.eos_ids)
        with engine.changing():
            if branch is not None and 0 < len(branch) == len(context) - 1:
                # no room, or weights that are damaged: fewer drafts, the same text
                self._few = few_suffice(context[-LOOKED_AT:])
                with suppress(PoolExhaustedError, CheckpointError), ahead(branch, self._memory, k) as rows:
                    self._draft(guesses, rows, context[-1], k)
        return guesses.draft

    def _draft(self, guesses: Guesses, rows: Ahead, token: int | None, k: int) -> None:
        for _ in range(k):
            if token is None:
                break
            token = guesses.take(self._row(rows, token, guesses))

    def _row(self, rows: Ahead, token: int, guesses: Guesses) -> Any:
        step, backend = Step((rows.span(token),), further=True, few=self._few), self.engine.backend
        if guesses.params.greedy and not guesses.masked:
            return backend.step_greedy(step)[0]
        return backend.step(step)[0]
