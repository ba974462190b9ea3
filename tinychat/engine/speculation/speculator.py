"""A drafter, a controller and an acceptance rule: what the engine loop asks for guesses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinychat.base.errors import TinychatError
from tinychat.engine.guide import Guide
from tinychat.engine.memory.branch import Branch
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation import Draft, Drafter
from tinychat.engine.speculation.control import Controller


@dataclass
class Speculator:
    """Lives as long as its conversation, so that what it learned carries over. Without a drafter it proposes
    nothing.

    rule: "coupled" or "rejection", both exact (`acceptance.py`).
    """

    drafter: Drafter | None = None
    controller: Controller = field(default_factory=Controller)
    rule: str = "coupled"
    notice: str = ""  # why there is no drafter although one was asked for
    company: bool = False  # whether other answers were in the last step: they would wait for a slow drafter
    _drafted: int = 0
    _draft_s: float = 0.0

    def begin(self, context: Sequence[int], branch: Branch) -> None:
        """An answer starts after `context`, of which the branch has all but the last token."""
        if self.drafter is not None:
            try:
                self.drafter.begin(context, branch)
            except Exception as e:
                self._drop(e)

    def propose(
        self,
        context: Sequence[int],
        room: int,
        params: SamplingParams,
        seed: int,
        guide: Guide | None = None,
    ) -> Draft:
        """Guesses for what follows `context`, as many as pay, at most `room`, none that `guide` refuses."""
        if self.drafter is None:
            return Draft([])
        began = time.perf_counter()
        waited_for = self.company and self.drafter.slow and self.controller.fixed is None
        k = 0 if waited_for else self.controller.choose(room)
        try:
            draft = self.drafter.propose(context, k, params, seed, guide) if k > 0 else Draft([])
        except Exception as e:
            self._drop(e)
            return Draft([])
        if guide is not None and draft.tokens:
            n = guide.fitting(draft.tokens)
            draft = Draft(draft.tokens[:n], draft.distributions[:n])
        self._drafted, self._draft_s = len(draft.tokens), time.perf_counter() - began
        return draft

    def note(self, accepted: int, step_s: float) -> None:
        """How the last proposal fared, and how long its verification took."""
        if self.drafter is not None:
            self.controller.note(self._drafted, accepted, self._draft_s, step_s)

    def speed_up(self) -> float:
        """Estimated gain over plain decoding so far; 1.0 without a drafter."""
        return self.controller.speed_up() if self.drafter is not None else 1.0

    def take_notice(self) -> str:
        """Sentence for the user, once."""
        notice, self.notice = self.notice, ""
        return notice

    def _drop(self, e: Exception) -> None:
        # Whatever goes wrong with a draft, the answer goes on without one.
        why = e.what if isinstance(e, TinychatError) else f"{type(e).__name__}: {e}"
        self.notice = f"The draft {self.drafter and self.drafter.name} is dropped: {why}"
        self.drafter = None
