"""Speculative decoding: drafters guess the next tokens, one step over the target verifies them, the text
stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tinychat.engine.guide import Guide
from tinychat.engine.memory.branch import Branch
from tinychat.engine.sampling import SamplingParams


@dataclass
class Draft:
    """Guessed tokens. `distributions[i]`: (ids, probabilities) that token i was drawn from; empty: all on the
    token. forced: nothing else can come.
    """

    tokens: list[int]
    distributions: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    forced: bool = False


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    name: str
    slow: bool  # whether drafting takes a part of a step

    def begin(self, context: Sequence[int], branch: Branch) -> None:
        """A generation starts from `context`; later calls see the same sequence, grown at its end.
        branch: what the model has read of it.
        """
        ...

    def propose(
        self,
        context: Sequence[int],
        k: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None = None,
    ) -> Draft:
        """At most k tokens after `context`; fewer, or none, when it has no guess. guide: there, says which
        tokens may come; guesses that it refuses are left out afterwards.
        """
        ...
