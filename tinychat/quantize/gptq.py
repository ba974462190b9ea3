"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): columns are rounded one after the other, and each one's error
is passed on to the columns that are not rounded yet.

For a row w of the weight and inputs X the error is (w − ŵ) H (w − ŵ)ᵀ with H = XXᵀ. Rounding w_q costs
(quant(w_q) − w_q)² / [H⁻¹]_qq, and the others repair most of it by moving by
δ = −(w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_:,q (eq. 2). H⁻¹ without the row and the column q (eq. 3) need not
be computed at each step: what is read of it are the rows of the upper Cholesky factor U of H⁻¹, so that
δ = −(w_q − quant(w_q)) / U_qq · U_q,: (section 3.3, step 3; algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.quantize.block import QuantizedBlock
from tinychat.quantize.experts import Mixture, given, reach
from tinychat.quantize.folding import norm16
from tinychat.quantize.forward import Forward, Group, Half
from tinychat.quantize.grids import Grid
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.rounding import Rounded, inverse_factor, one_thread, rounded_columns

if TYPE_CHECKING:
    import torch


@one_thread()
def gptq(
    w: torch.Tensor,
    h: torch.Tensor,
    grid: Grid,
    damp: float = 0.01,
    act_order: bool = False,
    search: bool = False,
) -> Rounded:
    """Round w by GPTQ, each group's range from its weights as they are when it is reached.

    w          float32 [out, in]
    h          float32 [in, in], mean of xxᵀ over inputs x
    damp       share of H's mean diagonal that is added to its diagonal (section 3.3, step 2)
    act_order  columns in the order of falling H_qq, so that large inputs are rounded while there are columns
               left to repair them; groups are then of inputs from all over the row (`Rounded.order`)
    search     choose ranges by the error that is left, which the paper does not; else the whole ones

    An input that was always zero is rounded to nearest: its error moves nothing. Raises ValueError if `in` is
    not a multiple of the grid's group.
    """
    import torch

    k = w.shape[1]
    if k % grid.span:
        raise ValueError(f"{k} inputs are not a multiple of group size {grid.span}")
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k)
    _, u = inverse_factor(h, order, damp)
    codes, parts = rounded_columns(w.T[order], u, grid, search)
    return Rounded(codes, parts, grid, order if act_order else None)


@dataclass(frozen=True)
class GPTQQuantizer:
    """Quantizes blocks in order, linear by linear in the order of use: each sees the inputs that the
    quantized network before it makes (section 4, setup).
    """

    forward: Forward
    grid: Callable[[int], Grid]
    act_order: bool = False
    search: bool = False
    damp: float = 0.01
    batch: int = 8  # windows in one forward pass

    def __call__(self, w: BlockWeights, x: torch.Tensor) -> tuple[QuantizedBlock, torch.Tensor]:
        """w: the float block (not changed). x [S, T, H]: its input in the quantized network, overwritten.
        Returns the quantized block and its output.
        """
        f, now = self.forward, BlockWeights(dict(w.linear), layer=w.layer)
        now.norm = {k: norm16(k, v, f.cfg) for k, v in w.norm.items()}
        now.bias = {k: v.half().float() for k, v in w.bias.items()}
        out = QuantizedBlock({}, now.bias, now.norm, w.layer)
        for half in f.halves(w.layer):
            if half.mixture:
                self._mixed(half, half.mixture, now, out, x)
                continue
            for group in half.groups[:-1]:
                self._round(group.names, now, out, self._inputs(half, group, now, x))
            last = half.groups[-1]
            inner = x.new_empty(*x.shape[:2], now.linear[last.names[0]].shape[1])
            self._round(last.names, now, out, self._inputs(half, last, now, x, inner))
            for b in self._batches(x):
                x[b] = f.value(half.end, now, {half.start: x[b], last.input: inner[b]})
        return out, x

    def advance(self, quantized: BlockWeights, x: torch.Tensor) -> torch.Tensor:
        """Past a block that is quantized already: its output, in place."""
        for s in self._batches(x):
            x[s] = self.forward.block(x[s], quantized)
        return x

    def _mixed(
        self, half: Half, mixture: Mixture, now: BlockWeights, out: QuantizedBlock, x: torch.Tensor
    ) -> None:
        """Round experts, and what every token takes beside them; x becomes what follows."""
        f = self.forward
        m, routed = given(f, half.start, mixture, now, x, self.batch)
        for e, tokens in enumerate(reach(routed, m)):
            into, down, rows = mixture.into.experts[e], mixture.down.experts[e], m[tokens]
            self._round(into.parts, now, out, [rows])
            self._round(down.parts, now, out, [mixture.between(e, now, rows)])
        for group in half.groups:
            self._round(group.names, now, out, self._inputs(half, group, now, x))
        for b in self._batches(x):
            x[b] = f.value(half.end, now, {half.start: x[b]})

    def _inputs(
        self, half: Half, group: Group, now: BlockWeights, x: torch.Tensor, kept: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Inputs of the linears of a group, batch by batch; they stay in `kept`."""
        for b in self._batches(x):
            read = self.forward.value(group.input, now, {half.start: x[b]})
            if kept is not None:
                kept[b] = read
            yield read

    def _round(
        self,
        names: Sequence[str],
        now: BlockWeights,
        out: QuantizedBlock,
        inputs: Iterable[torch.Tensor],
    ) -> None:
        """Round linears that read `inputs`, […, in] each; `now` and `out` get them."""
        products, n = None, 0
        for batch in inputs:
            rows = batch.flatten(0, -2)
            products = rows.T @ rows if products is None else products + rows.T @ rows
            n += len(rows)
        assert products is not None  # there is a window
        mean = products / n
        for name in names:
            w, grid = now.linear[name], self.grid(len(mean))
            out.linear[name] = gptq(w, mean, grid, self.damp, self.act_order, self.search)
            now.linear[name] = out.linear[name].dequantize()

    def _batches(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(x), self.batch):
            yield slice(start, start + self.batch)
