"""Quantizing the experts of a layer: each on the tokens of the calibration text that reach it.

An expert that hardly any token reaches is fitted to the tokens of the layer instead: what it would be given.
What all of them read comes from one norm, which the router reads too, so nothing before an expert takes
scales but the rows of its own up projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinychat.quantize.nodes import BlockWeights, ExpertProduct, Node, Product
from tinychat.quantize.routed import Routed

if TYPE_CHECKING:
    import torch

LEAST = 256  # tokens that an expert needs for statistics of its own; to be fitted, one for each input too
MOST = 8192  # tokens of the layer that stand in for them


@dataclass(frozen=True)
class Mixture:
    """The experts of a half.

    input   what is given to them, [S, T, H]
    routes  which of them a token takes
    into    their first linears, which read that
    middle  what becomes of these
    down    their last linears
    """

    input: Node
    routes: Node
    into: ExpertProduct
    middle: Node
    down: ExpertProduct

    @classmethod
    def of(cls, nodes: list[Node]) -> Mixture | None:
        """The mixture among the nodes of a half, if there is one."""
        products = [node for node in nodes if isinstance(node, ExpertProduct)]
        if not products:
            return None
        into, down = products
        return cls(into.inputs[0], into.inputs[1], into, down.inputs[0], down)

    @property
    def products(self) -> list[Product]:
        """The linears of all experts."""
        return [*self.into.experts, *self.down.experts]

    def between(self, expert: int, w: BlockWeights, rows: torch.Tensor) -> torch.Tensor:
        """What an expert's last linear reads, of what the first is given: [n, H] → [n, F]."""
        return self.middle.run(w, [self.into.experts[expert].run(w, rows)])[0]

    def rows_of_up(self, expert: int) -> str | None:
        """The linear whose rows are the inputs of the last one, but for a factor."""
        gated = self.middle.op in ("silu_mul", "gelu_mul")
        return self.into.experts[expert].parts[1] if gated else None


class Forward(Protocol):
    """What computes nodes (`forward.Forward`)."""

    def value(self, node: Node, w: BlockWeights, known: Mapping[Node, torch.Tensor]) -> Any:
        """The value of a node, from those that are known."""
        ...


def given(
    forward: Forward, start: Node, mixture: Mixture, w: BlockWeights, x: torch.Tensor, batch: int
) -> tuple[torch.Tensor, Routed]:
    """What the experts are given, [tokens, H], and where it goes. x: the residual stream, [S, T, H]."""
    import torch

    rows, routed, n = [], [], 0
    for part in x.split(batch):
        known = {start: part, mixture.input: forward.value(mixture.input, w, {start: part})}
        routed.append(forward.value(mixture.routes, w, known).behind(n))
        rows.append(known[mixture.input].flatten(0, 1))
        n += len(rows[-1])
    return torch.cat(rows), Routed.joined(routed)


def reach(routed: Routed, given: torch.Tensor) -> list[torch.Tensor]:
    """Numbers of the tokens that each expert is fitted to, int64: those that reach it, or some of all where
    these are few. With fewer tokens than inputs there are errors that none of them sees.

    given: what the experts are given, [tokens, H].
    """
    import torch

    n, k = given.shape
    some = torch.arange(0, n, max(1, -(-n // MOST)))
    least = min(max(LEAST, k), len(some))
    return [own if len(own) >= least else some for own in routed.tokens]


def mean_squares(
    mixture: Mixture, w: BlockWeights, x: torch.Tensor, routed: Routed, sums: dict[str | None, Any]
) -> None:
    """Add to `sums` of each expert's linears how many rows they read, and the squares of these: (n, [in]).
    Under None stands what the layer is given, under "" what all experts' last linears read together.

    x: what is given to them, [tokens, H].
    """

    def add(name: str | None, rows: torch.Tensor) -> None:
        n, squares = sums.get(name, (0, 0.0))
        sums[name] = n + len(rows), squares + rows.square().sum(0)

    add(None, x)
    for e, tokens in enumerate(routed.tokens):
        rows = x[tokens]
        inner = mixture.between(e, w, rows)
        for name in mixture.into.experts[e].parts:
            add(name, rows)
        for name in mixture.down.experts[e].parts:
            add(name, inner)
        add("", inner)


def means(mixture: Mixture, sums: dict[str | None, Any]) -> dict[str, torch.Tensor]:
    """Mean squares [in] for each linear of the experts, of those with few tokens the layer's."""
    out, least = {}, min(LEAST, sums[None][0])
    for product, whole in ((mixture.into, None), (mixture.down, "")):
        for name in (part for expert in product.experts for part in expert.parts):
            n, squares = sums[name] if sums[name][0] >= least else sums[whole]
            out[name] = squares / n
    return out
