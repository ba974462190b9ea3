"""Prompt lookup: what followed the last time these tokens occurred in this conversation (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from tinychat.sampling import SamplingParams
from tinychat.speculation import Draft


class PromptLookup:
    """Longest suffix match over n-grams of MIN…MAX tokens, the latest occurrence first.

    The index grows with the conversation: MAX − MIN + 1 entries a token, whatever its length.
    """

    name = "ngram"
    MIN, MAX = 2, 8

    def __init__(self):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where what followed it begins

    def begin(self, context: Sequence[int]) -> None:
        """Index `context`; a conversation that only grew keeps its index."""
        known = len(self._ids)
        if list(context[:known]) != self._ids:
            self._ids, self._after = [], {}
        self._extend(context)

    def propose(self, context: Sequence[int], k: int, params: SamplingParams, seed: int) -> Draft:
        """What followed the longest suffix of `context` that occurred before; chained if it runs into the
        end.
        """
        self._extend(context)
        out: list[int] = []
        at = self._find(context)
        while at is not None and len(out) < k:
            # Past the end of what is known the match continues in what it just proposed (a loop repeats
            # itself).
            out.append(self._ids[at] if at < len(self._ids) else out[at - len(self._ids)])
            at += 1
        return Draft(out)

    def _find(self, context: Sequence[int]) -> int | None:
        for n in range(min(self.MAX, len(context) - 1), self.MIN - 1, -1):
            at = self._after.get(tuple(context[-n:]))
            if at is not None:
                return at
        return None

    def _extend(self, context: Sequence[int]) -> None:
        # An n-gram is entered once its follower is known, so the present suffix never finds itself.
        for i in range(len(self._ids), len(context)):
            for n in range(self.MIN, min(self.MAX, i) + 1):
                self._after[tuple(context[i - n : i])] = i
            self._ids.append(context[i])
