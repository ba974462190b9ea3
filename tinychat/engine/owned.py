"""A branch and whose it is: which answer is being made on it, and since when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinychat.base.claims import Claim
from tinychat.engine.eviction import Ledger
from tinychat.engine.memory.branch import Branch, Part


class OwnedBranch(Branch):
    """A branch that gives its blocks back when its owner is gone."""

    def __init__(
        self,
        parts: Sequence[Part],
        known: Callable[[OwnedBranch], OwnedBranch],
        ledger: Ledger | None = None,
    ):
        """known: is told of this branch's forks, and gives them back."""
        super().__init__(parts, ledger=ledger)
        self._known = known
        self.last_used = 0
        self.claim = Claim()  # of the answer that is being made
        self.since = 0  # when it began, by the engine's clock

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self.claim.generator is not None

    def _empty(self, parts: Sequence[Part]) -> OwnedBranch:
        return self._known(OwnedBranch(parts, self._known))

    def fork(self) -> OwnedBranch:
        """Fork as a branch does; the second one gives its blocks back by itself, too."""
        other = super().fork()
        assert isinstance(other, OwnedBranch)  # as `_empty` makes them
        return other

    def __del__(self):
        for part in self.parts:
            if held := part.held():
                part.pool.abandon(held)
