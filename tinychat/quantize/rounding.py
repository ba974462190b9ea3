"""Rounding one linear to the levels of a grid so that its output, not its weights, changes least.

The error of a rounded weight Ŵ on inputs X is tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = XᵀX / n. Three steps, all on
that error: columns are rounded one after the other, each error passed on to the columns not yet rounded
(GPTQ, Frantar et al. 2023), and the range of a group is chosen when its first column comes up, by the error
that is left after that passing on (AWQ's clip search, but both ends move, and what compensation repairs is
not held against a range); then codes are revisited one by one (coordinate descent), and scales refitted by
least squares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tinychat.network.weights import QuantizedLinear
from tinychat.quantize.grids import Grid, Parts

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # floats in the largest temporary of a sweep; with a quarter of it calls cost more than sums
TILE = 16  # columns whose errors are passed on one by one; to later ones, a tile at a time
SWEPT = 36  # candidates that a chunk has room for


@dataclass
class Rounded:
    """A weight on a grid.

    codes  float [out, in] with integer values
    parts  what stands beside them, as `grid` has it: each [out, in/group]
    order  int64 [in], column j of `codes` multiplies input `order[j]`; None: as they are
    """

    codes: torch.Tensor
    parts: Parts
    grid: Grid
    order: torch.Tensor | None = None

    @property
    def scales(self) -> torch.Tensor:
        """float32 [out, in/group]."""
        return self.grid.values(self.parts)[0]

    def grouped(self, a: torch.Tensor) -> torch.Tensor:
        """[out, in] to [out, in/group, group]."""
        return a.view(len(a), -1, self.grid.group)

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        scales, offsets = self.grid.values(self.parts)
        w = (self.grouped(self.codes) * scales[..., None] + offsets[..., None]).view_as(self.codes)
        return w if self.order is None else w[:, self.order.argsort()]

    def divide_rows(self, s: torch.Tensor) -> None:
        """Divide output row i by s[i]: the codes stay, the scales change."""
        self.parts = self.grid.divided(self.parts, s[:, None])

    def stacked(self, more: list[Rounded]) -> Rounded:
        """The rows of all of them, which share an input and so its order."""
        import torch

        every = [self, *more]
        codes = torch.cat([r.codes for r in every])
        parts = tuple(torch.cat(rows) for rows in zip(*(r.parts for r in every), strict=True))
        return Rounded(codes, parts, self.grid, self.order) if more else self

    def canonical(self, bias: torch.Tensor | None) -> QuantizedLinear:
        """The weight that is written."""
        return replace(
            self.grid.linear(self.codes.numpy().astype(np.uint8), self.parts),
            perm=None if self.order is None else self.order.numpy().astype(np.int32),
            bias=None if bias is None else bias.numpy(),
        )


class Metric:
    """How much each error of a weight matters: H of its inputs, damped, and the factor for passing errors on.

    h      float32 [in, in]
    order  int64 [in]: columns are rounded in this order, groups with large inputs first, groups kept together
    u      float32 [in, in], upper triangular, UᵀU = H⁻¹, rows and columns in that order
    """

    def __init__(self, h: torch.Tensor, order: torch.Tensor, u: torch.Tensor):
        self.h, self.order, self.u = h, order, u

    @classmethod
    def of(cls, h: torch.Tensor, grid: Grid, damp: float = 0.01) -> Metric:
        """h: float32 [in, in], symmetric. damp: share of the mean diagonal that is added to the diagonal."""
        order = loudest_first(h.diagonal(), grid)
        h, u = inverse_factor(h, order, damp)
        return cls(h, order, u)

    @classmethod
    def diagonal(cls, weight: torch.Tensor) -> Metric:
        """The metric in which an error of input j costs weight[j] and nothing repairs another's."""
        import torch

        weight = weight + 0.01 * weight.mean() + 1e-12
        return cls(weight.diag(), torch.arange(len(weight)), weight.rsqrt().diag())

    def scaled(self, s: torch.Tensor) -> Metric:
        """The metric of the weight W·diag(s), whose inputs are x / s."""
        return Metric(self.h / s / s[:, None], self.order, self.u * s[self.order])

    def loss(self, w: torch.Tensor, r: Rounded) -> float:
        """tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
        d = w - r.dequantize()
        return float(((d @ self.h) * d).sum())


def inverse_factor(h: torch.Tensor, order: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H with `damp` of its mean diagonal added; the upper U with UᵀU = H⁻¹, rows and columns in `order`."""
    import torch

    h = h.clone()
    diagonal = h.diagonal()
    floor = damp * diagonal.mean() + 1e-12
    diagonal += floor
    while True:
        try:
            lower = torch.linalg.cholesky(h[order][:, order].double())
            return h, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
        except torch.linalg.LinAlgError:  # float32 sums of nearly dependent inputs
            floor *= 10
            diagonal += floor


def loudest_first(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The order int64 [in] in which inputs of falling weight [in] are rounded: those of a group together, and
    the groups of a span.
    """
    import torch

    inside = weight.view(-1, grid.group).argsort(dim=1, descending=True)
    groups = weight.view(-1, grid.span // grid.group, grid.group).sum(2).argsort(dim=1, descending=True)
    spans = weight.view(-1, grid.span).sum(1).argsort(descending=True)
    first = torch.arange(len(spans))[:, None] * (grid.span // grid.group)
    of_group = (groups + first)[spans].flatten()
    return (inside + torch.arange(0, len(weight), grid.group)[:, None])[of_group].flatten()


def nearest(w: torch.Tensor, grid: Grid) -> Rounded:
    """Round to nearest on each group's whole range (RTN). w: float32 [out, in]."""
    import torch

    n, k = w.shape
    columns, parts = w.T, []
    for start in range(0, k, grid.span):
        span = columns[start : start + grid.span]
        shared = grid.shared(span, torch.ones(len(span)))
        parts += [grid.whole(g, shared) for g in span.split(grid.group)]
    beside = tuple(torch.stack(p, dim=1) for p in zip(*parts, strict=True))
    scale, offset = (b[..., None] for b in grid.values(beside))
    codes = ((w.view(n, -1, grid.group) - offset) / scale).round().clamp(grid.least, grid.levels)
    return Rounded(codes.view(n, k), beside, grid)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensor operations run in this thread alone: a sweep makes thousands of small ones, and where another
    program holds a core, each would wait at a barrier (6 times slower beside one busy process, two cores).
    """
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


@one_thread()
def compensated(w: torch.Tensor, metric: Metric, grid: Grid, search: bool = True) -> Rounded:
    """Round column by column, passing errors on; `search`: choose each group's range by the error that is
    left.

    w: float32 [out, in]. Rows are independent of each other.
    """
    columns = w.T[metric.order]  # [in, out]: a column of w lies in one piece
    codes, parts = rounded_columns(columns, metric.u, grid, search)
    back = metric.order.argsort()
    groups = back.view(-1, grid.group)[:, 0] // grid.group  # where each group came in the order
    return Rounded(codes[:, back].contiguous(), tuple(p[:, groups].contiguous() for p in parts), grid)


def rounded_columns(w: torch.Tensor, u: torch.Tensor, grid: Grid, search: bool) -> tuple[torch.Tensor, Parts]:
    """The same for w [in, out], rows in order: codes [out, in]; parts [out, groups]."""
    import torch

    rows = max(1, CHUNK // (grid.group * SWEPT)) if search else max(1, CHUNK // len(w))
    done = [_chunk(part.contiguous(), u, grid, search) for part in w.split(rows, dim=1)]
    codes = torch.cat([codes for codes, _ in done], dim=1).T.contiguous()
    parts = zip(*(parts for _, parts in done), strict=True)
    return codes, tuple(torch.cat(p, dim=1).T.contiguous() for p in parts)


def _chunk(w: torch.Tensor, u: torch.Tensor, grid: Grid, search: bool) -> tuple[torch.Tensor, Parts]:
    """Codes [in, out] and parts [groups, out] of w [in, out], which is overwritten."""
    import torch

    shared: Parts = ()
    codes, parts = torch.empty_like(w), []
    weight = u.diagonal().pow(-2)  # what an error costs that nothing repairs
    for start in range(0, len(w), grid.group):
        span = slice(start, start + grid.group)
        if start % grid.span == 0:
            whole = slice(start, start + grid.span)
            shared = grid.shared(w[whole], weight[whole])
        part, ub = w[span], u[span, span]
        chosen = _searched(part, ub, grid, shared) if search else grid.whole(part, shared)
        error = torch.empty_like(part)
        _sweep(part.clone(), *grid.values(chosen), grid, ub, codes[span], error)
        parts.append(chosen)
        w[span.stop :] -= u[span, span.stop :].T @ error
    return codes, tuple(torch.stack(p) for p in zip(*parts, strict=True))


def _searched(w: torch.Tensor, u: torch.Tensor, grid: Grid, shared: Parts) -> Parts:
    """The candidates of groups w [group, out] with the least error left when their columns are rounded."""
    candidates = grid.candidates(w, shared)
    s, o = grid.values(candidates)
    wide = w[:, None, :].repeat(1, len(s), 1).view(grid.group, -1)
    best = _sweep(wide, s.flatten(), o.flatten(), grid, u).view(s.shape).argmin(0, keepdim=True)
    return tuple(p.gather(0, best)[0] for p in candidates)


def _sweep(
    w: torch.Tensor,
    s: torch.Tensor,
    o: torch.Tensor,
    grid: Grid,
    u: torch.Tensor,
    codes: torch.Tensor | None = None,
    errors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round groups w [group, M] (overwritten) with scales s and offsets o [M]; the loss [M].

    codes, errors: [group, M] to fill, or None when only the loss is wanted.
    """
    import torch

    inverse, loss = 1 / s, torch.zeros(w.shape[1])
    q, tile = torch.empty_like(loss), torch.empty(TILE, w.shape[1])
    for start in range(0, len(w), TILE):
        end = min(start + TILE, len(w))
        for j in range(start, end):
            torch.sub(w[j], o, out=q).mul_(inverse).round_().clamp_(grid.least, grid.levels)
            if codes is not None:
                codes[j] = q
            e = torch.addcmul(o, q, s, out=tile[j - start]).sub_(w[j]).mul_(-1 / float(u[j, j]))
            loss.addcmul_(e, e)
            if j + 1 < end:
                w[j + 1 : end].addcmul_(u[j, j + 1 : end, None], e, value=-1)
        if errors is not None:
            errors[start:end] = tile[: end - start]
        if end < len(w):
            w[end:].addmm_(u[start:end, end:].T, tile[: end - start], alpha=-1)
    return loss


def refine(w: torch.Tensor, metric: Metric, r: Rounded, rounds: int = 2) -> Rounded:
    """Lower the metric's loss from `r`, in place: codes by coordinate descent, scales by least squares."""
    for _ in range(rounds):
        _descend(w, metric.h, r)
        _refit(w, metric.h, r)
    _descend(w, metric.h, r)
    return r


@one_thread()
def _descend(w: torch.Tensor, h: torch.Tensor, r: Rounded) -> None:
    """One pass over the columns; each code moves to the level that is best given all the others."""
    import torch

    grid, group = r.grid, r.grid.group
    gradient = h @ (w - r.dequantize()).T  # [in, out]
    codes, scales = r.codes.T.contiguous(), r.scales.T.contiguous()
    for start in range(0, len(h), TILE):
        end = min(start + TILE, len(h), (start // group + 1) * group)
        tile, moved = gradient[start:end], torch.empty(end - start, len(w))
        s = scales[start // group]
        for j in range(start, end):
            new = tile[j - start] / (h[j, j] * s)
            new.round_().add_(codes[j]).clamp_(grid.least, grid.levels)
            torch.sub(new, codes[j], out=moved[j - start]).mul_(s)
            codes[j] = new
            if j + 1 < end:
                tile[j + 1 - start :].addcmul_(h[j, j + 1 : end, None], moved[j - start], value=-1)
        gradient[end:].addmm_(h[start:end, end:].T, moved, alpha=-1)
    r.codes = codes.T.contiguous()


def _refit(w: torch.Tensor, h: torch.Tensor, r: Rounded) -> None:
    """The moving parts that are best for the codes: one small least-squares problem a row."""
    import torch

    n, k = w.shape
    grid = r.grid
    spans, p = k // grid.span, grid.moving
    each = grid.span // grid.group  # groups of a span
    basis = torch.stack([b.reshape(n, spans, -1) for b in grid.basis(r.grouped(r.codes), r.parts)], 2)
    a = torch.empty(n, spans, p, spans, p)
    for i in range(spans):
        t = basis[:, i] @ h[i * grid.span : (i + 1) * grid.span]  # [n, p, in]
        a[:, i] = torch.einsum("npsj,nsqj->npsq", t.view(n, p, spans, -1), basis)
    a = a.view(n, spans * p, spans * p)
    # Solved for the change, so that the damping pulls towards the present values.
    gradient = ((w - r.dequantize()) @ h).view(n, spans, 1, -1)
    b = (gradient * basis).sum(-1).view(n, -1)
    damping = 1e-4 * a.diagonal(dim1=1, dim2=2)
    damping = damping + 1e-4 * damping.mean(-1, keepdim=True) + 1e-12
    change = torch.linalg.solve(a + torch.diag_embed(damping), b).view(n, spans, p)
    change = change.repeat_interleave(each, dim=1)
    r.parts = grid.moved(r.parts, tuple(r.parts[i] + change[..., i] for i in range(p)))
