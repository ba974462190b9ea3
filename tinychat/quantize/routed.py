"""Where the tokens of windows go in a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Routed:
    """Which tokens each expert gets: of each their numbers among all, int64 [n], and how much it counts for
    them, float32 [n].
    """

    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]

    @classmethod
    def of(cls, chosen: torch.Tensor, weights: torch.Tensor, n: int) -> Routed:
        """chosen, weights: [tokens, taken]. n: how many experts there are."""
        import torch

        found = [torch.nonzero(chosen == e, as_tuple=True) for e in range(n)]
        return cls([tokens for tokens, _ in found], [weights[at] for at in found])

    def behind(self, n: int) -> Routed:
        """The same behind n other tokens."""
        return Routed([tokens + n for tokens in self.tokens], self.weights)

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """All tokens of several, in their order."""
        import torch

        tokens = zip(*(part.tokens for part in parts), strict=True)
        weights = zip(*(part.weights for part in parts), strict=True)
        return cls([torch.cat(each) for each in tokens], [torch.cat(each) for each in weights])
