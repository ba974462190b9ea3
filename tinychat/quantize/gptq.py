"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): columns are rounded one after the other, and each one's error
is passed on to the columns that are not rounded yet.

For a row w of the weight and inputs X the error is (w − ŵ) H (w − ŵ)ᵀ with H = XXᵀ. Rounding w_q costs
(quant(w_q) − w_q)² / [H⁻¹]_qq, and the others repair most of it by moving by
δ = −(w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_:,q (eq. 2). H⁻¹ without the row and the column q (eq. 3) need not
be computed at each step: what is read of it are the rows of the upper Cholesky factor U of H⁻¹, so that
δ = −(w_q − quant(w_q)) / U_qq · U_q,: (section 3.3, step 3; algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.quantize.block import QuantizedBlock, norm16
from tinychat.quantize.forward import DOWN, GATE_UP, O_PROJ, QKV, BlockWeights, Forward
from tinychat.quantize.rounding import CHUNK, Rounded, inverse_factor, one_thread, rounded_columns

if TYPE_CHECKING:
    import torch


@one_thread()
def gptq(
    w: torch.Tensor, h: torch.Tensor, group: int, damp: float = 0.01, act_order: bool = False
) -> Rounded:
    """Round w to 4-bit groups by GPTQ, each group's grid from its weights as they are when it is reached.

    w          float32 [out, in]
    h          float32 [in, in], mean of xxᵀ over inputs x
    damp       share of H's mean diagonal that is added to its diagonal (section 3.3, step 2)
    act_order  columns in the order of falling H_qq, so that large inputs are rounded while there are columns
               left to repair them; groups are then of inputs from all over the row (`Rounded.order`)

    An input that was always zero is rounded to nearest: its error moves nothing. Zero points are 1…15, which
    GPTQ's files hold whatever their version. Raises ValueError if `in` is not a multiple of `group`.
    """
    import torch

    k = w.shape[1]
    if group <= 0 or k % group:
        raise ValueError(f"{k} inputs are not a multiple of group size {group}")
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k)
    _, u = inverse_factor(h, order, damp)
    columns = w.T[order]
    rows = max(1, CHUNK // k)
    parts = [rounded_columns(p.contiguous(), u, group, False, lowest=1) for p in columns.split(rows, dim=1)]
    codes, scales, zeros = (torch.cat(p, dim=1).T.contiguous() for p in zip(*parts, strict=True))
    return Rounded(codes, scales, zeros, order if act_order else None)


@dataclass(frozen=True)
class GPTQQuantizer:
    """Quantizes blocks in order, linear by linear in the order of use: each sees the inputs that the
    quantized network before it makes (section 4, setup).
    """

    forward: Forward
    group: int
    act_order: bool = False
    damp: float = 0.01
    batch: int = 8  # windows in one forward pass

    def __call__(self, w: BlockWeights, x: torch.Tensor) -> tuple[QuantizedBlock, torch.Tensor]:
        """w: the float block (not changed). x [S, T, H]: its input in the quantized network, overwritten.
        Returns the quantized block and its output.
        """
        import torch

        f, now = self.forward, w.copy()
        now.norm = {k: norm16(v, f.cfg) for k, v in w.norm.items()}
        now.bias = {k: v.half().float() for k, v in w.bias.items()}
        out = QuantizedBlock({}, now.bias, now.norm, w.layer)

        self._round(QKV, now, out, (f.attention_input(x[s], now) for s in self._batches(x)))
        inner = torch.empty(*x.shape[:2], now.linear[O_PROJ].shape[1])
        self._round((O_PROJ,), now, out, self._kept(inner, x, self._attended(now)))
        for s in self._batches(x):
            x[s] = f.add_attention(x[s], f.linear(inner[s], now, O_PROJ), now)
        self._round(GATE_UP, now, out, (f.mlp_input(x[s], now) for s in self._batches(x)))
        inner = torch.empty(*x.shape[:2], now.linear[DOWN].shape[1])
        self._round((DOWN,), now, out, self._kept(inner, x, self._middle(now)))
        for s in self._batches(x):
            x[s] = f.add_mlp(x[s], f.linear(inner[s], now, DOWN), now)
        return out, x

    def advance(self, quantized: BlockWeights, x: torch.Tensor) -> torch.Tensor:
        """Past a block that is quantized already: its output, in place."""
        for s in self._batches(x):
            x[s] = self.forward.block(x[s], quantized)
        return x

    def _attended(self, now: BlockWeights) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: self.forward.attend(self.forward.attention_input(x, now), now)

    def _middle(self, now: BlockWeights) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: self.forward.middle(self.forward.mlp_input(x, now), now)

    def _kept(
        self, inner: torch.Tensor, x: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """`read` of x, batch by batch, which stays in `inner`."""
        for s in self._batches(x):
            inner[s] = read(x[s])
            yield inner[s]

    def _round(
        self, names: tuple[str, ...], now: BlockWeights, out: QuantizedBlock, inputs: Iterable[torch.Tensor]
    ) -> None:
        """Round the linears `names`, which read `inputs`; `now` and `out` get them."""
        h, n = 0, 0
        for batch in inputs:
            rows = batch.flatten(0, 1)
            h, n = h + rows.T @ rows, n + len(rows)
        for name in names:
            out.linear[name] = gptq(now.linear[name], h / n, self.group, self.damp, self.act_order)
            now.linear[name] = out.linear[name].dequantize()

    def _batches(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(x), self.batch):
            yield slice(start, start + self.batch)
