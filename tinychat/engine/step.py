"""One step over the rows of several sequences: what each gets, and what stays of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.backends.interface import LARGEST_ROWS, Backend, Span, Step
from tinychat.engine.sampling import best_of, largest_suffice, total_temperature
from tinychat.engine.scheduler import Rows


@dataclass(eq=False)
class Part:
    """One sequence's part of a step: its first n rows, for which there is room.

    stay: they are no drafts, so votes are added where they stay.
    scores, voters: where the backend adds what the last so many rows attend to, if somebody wants to know.
    """

    rows: Rows
    n: int
    span: Span
    stay: bool
    scores: np.ndarray | None
    voters: int

    @property
    def asked(self) -> int:
        """Rows that get logits."""
        return self.n - self.span.logits_from

    @property
    def greedy(self) -> bool:
        """Whether ids are all that it takes."""
        return self.rows.params is not None and self.rows.params.greedy and not self.rows.masked

    def voting(self) -> AbstractContextManager[None]:
        """While votes are added where they stay: where that fails, the branch is given up."""
        return self.rows.branch.rewritten() if self.scores is not None and self.stay else nullcontext()

    def keep(self, out: Any) -> None:
        """The rows have run, and these are their logits."""
        rows, branch = self.rows, self.rows.branch
        last, n = self.n == len(rows.ids), self.n
        with self.voting():
            if last and rows.take is not None:
                n = rows.take(out)
            with branch.rewritten() if branch.ledger else nullcontext():
                branch.commit(rows.ids[:n])
                if branch.ledger:
                    branch.ledger.append(n, min(self.voters, n), None if self.stay else self.scores)
        if last and rows.then is not None:
            rows.then()
        rows.finish(self.n)


def run_step(backend: Backend, parts: Sequence[Part]) -> None:
    """Run them, and keep what came. A part that fails with what came has an `error`; what the step raises is
    raised.
    """
    with ExitStack() as votes:
        for part in parts:
            votes.enter_context(part.voting())
        for part, out in zip(parts, _outputs(backend, parts), strict=True):
            try:
                part.keep(out)
            except Exception as e:
                part.rows.finish(error=e)


def _outputs(backend: Backend, parts: Sequence[Part]) -> list[Any]:
    """Results for each part: ids, the largest logits, or all of them."""
    step = Step(tuple(part.span for part in parts))
    asking = [part for part in parts if part.asked] or parts
    greedy = all(part.greedy for part in asking)
    out: Any
    if greedy:
        out = backend.step_greedy(step)
    elif backend.step_largest is not None and _largest_suffice(asking):
        out = backend.step_largest(step, _temperature(asking))
    else:
        out = backend.step(step)
    if len(parts) == 1:
        return [out]
    outputs, at = [], 0
    for part in parts:
        mine, at = out[at : at + part.asked], at + part.asked
        outputs.append([best_of(row) for row in mine] if part.greedy and not greedy else mine)
    return outputs


def _largest_suffice(parts: Sequence[Part]) -> bool:
    if sum(part.asked for part in parts) > LARGEST_ROWS:
        return False
    return all(part.rows.params is not None and largest_suffice(part.rows.params) for part in parts)


def _temperature(parts: Sequence[Part]) -> float:
    """Temperature of the totals that come with the largest logits; 0, none, where parts want different ones.
    They save reading the row, and decide nothing.
    """
    wanted = {total_temperature(part.rows.params) for part in parts if part.rows.params} - {0.0}
    return wanted.pop() if len(wanted) == 1 else 0.0
