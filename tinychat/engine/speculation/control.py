"""How many tokens to draft: the number that makes the most tokens a second, learned from the steps that
really ran.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_DRAFT = 8
FORGET = 0.95  # weight of the past, a step, in the acceptance estimate
OVERHEAD = 0.02  # share of the time that probing may cost while drafting does not pay


@dataclass
class _Mean:
    """A running mean that forgets."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, x: float, forget: float = 0.9) -> None:
        self.weight = self.weight * forget + 1
        self.value += (x - self.value) / self.weight


@dataclass
class Controller:
    """Chooses k each step: the k that maximises (1 − α^(k+1)) / (1 − α) / (k·c + v(k)).

    α is the running acceptance of a draft, c the time of drafting one token, v(k) the time of a step over k +
    1 rows, all from steps that ran. Rows never tried are extrapolated along the line through what was seen.
    Where no k > 0 pays, a probe runs now and then, seldom enough to cost at most OVERHEAD of the time.
    `fixed` turns all of it off.
    """

    fixed: int | None = None
    accepted: float = 3.0  # an optimistic start: the first drafts are tried
    tried: float = 4.0
    draft_s: _Mean = field(default_factory=_Mean)
    step_s: dict[int, _Mean] = field(default_factory=dict)
    quiet: int = 0  # steps since something was drafted
    spent_s: float = 0.0
    decided: int = 0  # tokens that the noted steps decided

    def choose(self, room: int) -> int:
        """Tokens to draft now, at most `room`."""
        limit = min(MAX_DRAFT, room)
        if self.fixed is not None:
            return max(0, min(self.fixed, room))
        if limit <= 0:
            return 0
        if not self.step_s.get(1):
            return 0  # the first step tells what a plain one costs
        best = max(range(limit + 1), key=self.rate)
        if best == 0:
            extra = self.cost(1) - self.cost(0)
            if self.quiet * self.cost(0) * OVERHEAD >= extra:
                return 1
        return best

    def alpha(self) -> float:
        """The chance that a draft is accepted, given that those before it were."""
        return min(0.99, self.accepted / self.tried)

    def cost(self, k: int) -> float:
        """Seconds of drafting k tokens and verifying them."""
        return k * self.draft_s.value + self.verify(k + 1)

    def verify(self, rows: int) -> float:
        """Seconds of a step over `rows` rows: seen, or along the line through the nearest that were."""
        seen = {r: m.value for r, m in self.step_s.items()}
        if rows in seen:
            return seen[rows]
        one = seen.get(1) or min(seen.values())
        others = [(abs(r - rows), r) for r in seen if r > 1]
        if not others:
            return one * (1 + 0.02 * (rows - 1))  # a bandwidth-bound step hardly grows
        r = min(others)[1]
        return one + (seen[r] - one) * (rows - 1) / (r - 1)

    def rate(self, k: int) -> float:
        """Expected tokens a second when drafting k."""
        a = self.alpha()
        return (1 - a ** (k + 1)) / (1 - a) / max(self.cost(k), 1e-9)

    def note(self, drafted: int, accepted: int, draft_s: float, step_s: float) -> None:
        """Take in what a step did: tokens drafted and accepted, seconds spent on both parts."""
        self.step_s.setdefault(drafted + 1, _Mean()).add(step_s)
        self.spent_s += draft_s + step_s
        self.decided += accepted + 1
        if drafted:
            self.draft_s.add(draft_s / drafted)
            self.accepted = self.accepted * FORGET + accepted
            # A rejection ends the window, so one failure was tried after the accepted ones.
            self.tried = self.tried * FORGET + accepted + (accepted < drafted)
            self.quiet = 0
        else:
            self.quiet += 1

    def speed_up(self) -> float:
        """Estimated gain over plain decoding so far: plain steps for the same tokens, over the time spent."""
        plain = self.step_s.get(1)
        return self.decided * plain.value / self.spent_s if plain and self.spent_s else 1.0
