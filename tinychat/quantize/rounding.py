"""Rounding one linear to 4-bit groups so that its output, not its weights, changes least.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinychat.network.weights import QuantizedLinear

if TYPE_CHECKING:
    import torch

LEVELS = 15
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68)  # candidate ranges, as fractions of the whole one
CHUNK = 1 << 20  # floats in the largest temporary of a sweep; with a quarter of it calls cost more than sums
TILE = 16  # columns whose errors are passed on one by one; to later ones, a tile at a time
MIN_SCALE = 1e-6  # still a normal-enough fp16 number


@dataclass
class Rounded:
    """Codes and zeros as float tensors with integer values; scales float32 that fp16 represents.

    codes [out, in], scales and zeros [out, in/group]. order: int64 [in], column j of `codes` multiplies input
    `order[j]`; None: as they are.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        n, k = self.codes.shape
        q = self.codes.view(n, -1, self.group)
        w = ((q - self.zeros[..., None]) * self.scales[..., None]).reshape(n, k)
        return w if self.order is None else w[:, self.order.argsort()]

    def divide_rows(self, s: torch.Tensor) -> None:
        """Divide output row i by s[i]: the codes stay, the scales change."""
        self.scales = fp16(self.scales / s[:, None])

    def stacked(self, more: list[Rounded]) -> Rounded:
        """The rows of all of them, which share an input and so its order."""
        import torch

        def rows(name: str) -> torch.Tensor:
            return torch.cat([getattr(r, name) for r in (self, *more)])

        return Rounded(rows("codes"), rows("scales"), rows("zeros"), self.order) if more else self

    def canonical(self, bias: torch.Tensor | None) -> QuantizedLinear:
        """The weight that is written."""
        return QuantizedLinear(
            codes=self.codes.numpy().astype(np.uint8),
            scales=self.scales.numpy().astype(np.float16),
            zeros=self.zeros.numpy().astype(np.uint8),
            perm=None if self.order is None else self.order.numpy().astype(np.int32),
            bias=None if bias is None else bias.numpy(),
        )


def fp16(scale: torch.Tensor) -> torch.Tensor:
    """Positive scales rounded to what fp16 holds, as float32."""
    return scale.clamp(MIN_SCALE, 65504.0).half().float()


class Metric:
    """How much each error of a weight matters: H of its inputs, damped, and the factor for passing errors on.

    h      float32 [in, in]
    order  int64 [in]: columns are rounded in this order, groups with large inputs first, groups kept together
    u      float32 [in, in], upper triangular, UᵀU = H⁻¹, rows and columns in that order
    """

    def __init__(self, h: torch.Tensor, order: torch.Tensor, u: torch.Tensor):
        self.h, self.order, self.u = h, order, u

    @classmethod
    def of(cls, h: torch.Tensor, group: int, damp: float = 0.01) -> Metric:
        """h: float32 [in, in], symmetric. damp: share of the mean diagonal that is added to the diagonal."""
        import torch

        weight = h.diagonal().view(-1, group)
        inside = weight.argsort(dim=1, descending=True)
        groups = weight.sum(1).argsort(descending=True)
        order = (inside + torch.arange(0, len(h), group)[:, None])[groups].flatten()
        h, u = inverse_factor(h, order, damp)
        return cls(h, order, u)

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


def nearest(w: torch.Tensor, group: int, lowest: int = 0) -> Rounded:
    """Round to nearest on each group's whole range (RTN). w: float32 [out, in]; lowest: of zero points."""
    n, k = w.shape
    g = w.view(n, -1, group)
    lo, hi = g.amin(-1).clamp_max(0), g.amax(-1).clamp_min(0)
    if lowest:
        lo = lo.minimum(-hi * lowest / (LEVELS - lowest))
    scale = fp16((hi - lo) / LEVELS)
    zero = (-lo / scale).round().clamp(lowest, LEVELS)
    codes = ((g / scale[..., None]).round() + zero[..., None]).clamp(0, LEVELS)
    return Rounded(codes.view(n, k), scale, zero)


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
def compensated(w: torch.Tensor, metric: Metric, group: int, search: bool = True) -> Rounded:
    """Round column by column, passing errors on; `search`: choose each group's range by the error that is
    left.

    w: float32 [out, in]. Rows are independent of each other.
    """
    import torch

    columns = w.T[metric.order]  # [in, out]: a column of w lies in one piece
    rows = max(1, CHUNK // (group * 4 * len(SHRINK))) if search else max(1, CHUNK // w.shape[1])
    parts = [rounded_columns(p.contiguous(), metric.u, group, search) for p in columns.split(rows, dim=1)]
    codes, scales, zeros = (torch.cat(p, dim=1).T for p in zip(*parts, strict=True))
    back = metric.order.argsort()
    groups = back.view(-1, group)[:, 0] // group  # where each group came in the order
    return Rounded(codes[:, back].contiguous(), scales[:, groups].contiguous(), zeros[:, groups].contiguous())


def rounded_columns(w, u, group, search, lowest=0):
    """The same for w [in, out] (overwritten), rows in order: codes [in, out]; scales, zeros [groups, out]."""
    import torch

    k, n = w.shape
    codes = torch.empty_like(w)
    scales, zeros = torch.empty(k // group, n), torch.empty(k // group, n)
    for b in range(k // group):
        span = slice(b * group, (b + 1) * group)
        part, ub = w[span], u[span, span]
        if search:
            s, z = _candidates(part)  # [C, out]
            wide = part[:, None, :].repeat(1, len(s), 1).view(group, -1)
            best = _sweep(wide, s.flatten(), z.flatten(), ub).view(s.shape).argmin(0, keepdim=True)
            s, z = s.gather(0, best)[0], z.gather(0, best)[0]
        else:
            r = nearest(part.T, group, lowest)
            s, z = r.scales[:, 0], r.zeros[:, 0]
        error = torch.empty_like(part)
        _sweep(part.clone(), s, z, ub, codes[span], error)
        scales[b], zeros[b] = s, z
        w[span.stop :] -= u[span, span.stop :].T @ error
    return codes, scales, zeros


def _candidates(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros worth trying for the groups w [group, out]: each [C, out].

    Ranges from the whole one down, each at four zero points around the one that clips both ends alike.
    """
    import torch

    lo, hi = w.amin(0).clamp_max(0), w.amax(0).clamp_min(0)
    scale = fp16((hi - lo) / LEVELS * torch.tensor(SHRINK)[:, None])
    middle = (LEVELS / 2 - (hi + lo) / 2 / scale).floor()
    zeros = (middle[:, None] + torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None]).clamp(0, LEVELS)
    return scale[:, None].expand_as(zeros).flatten(0, 1), zeros.flatten(0, 1)


def _sweep(w, s, z, u, codes=None, errors=None):
    """Round groups w [group, M] (overwritten) on the grids s, z [M]; the loss [M].

    codes, errors: [group, M] to fill, or None when only the loss is wanted.
    """
    import torch

    inverse, loss = 1 / s, torch.zeros(w.shape[1])
    q, tile = torch.empty_like(loss), torch.empty(TILE, w.shape[1])
    for start in range(0, len(w), TILE):
        end = min(start + TILE, len(w))
        for j in range(start, end):
            torch.mul(w[j], inverse, out=q).round_().add_(z).clamp_(0, LEVELS)
            if codes is not None:
                codes[j] = q
            e = torch.sub(q, z, out=tile[j - start]).mul_(s).sub_(w[j]).mul_(-1 / float(u[j, j]))
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

    group = r.group
    gradient = h @ (w - r.dequantize()).T  # [in, out]
    codes, scales = r.codes.T.contiguous(), r.scales.T.contiguous()
    for start in range(0, len(h), TILE):
        end = min(start + TILE, len(h), (start // group + 1) * group)
        tile, moved = gradient[start:end], torch.empty(end - start, len(w))
        s = scales[start // group]
        for j in range(start, end):
            new = tile[j - start] / (h[j, j] * s)
            new.round_().add_(codes[j]).clamp_(0, LEVELS)
            torch.sub(new, codes[j], out=moved[j - start]).mul_(s)
            codes[j] = new
            if j + 1 < end:
                tile[j + 1 - start :].addcmul_(h[j, j + 1 : end, None], moved[j - start], value=-1)
        gradient[end:].addmm_(h[start:end, end:].T, moved, alpha=-1)
    r.codes = codes.T.contiguous()


def _refit(w: torch.Tensor, h: torch.Tensor, r: Rounded) -> None:
    """The scales that are best for the codes: one small least-squares problem a row."""
    import torch

    n = len(w)
    group, groups = r.group, r.scales.shape[1]
    c = r.codes.view(n, groups, group) - r.zeros[..., None]
    a = torch.empty(n, groups, groups)
    for g in range(groups):
        t = c[:, g] @ h[g * group : (g + 1) * group]
        a[:, g] = (t.view(n, groups, group) * c).sum(-1)
    b = ((w @ h).view(n, groups, group) * c).sum(-1)
    # Solved for the change, so that the damping pulls towards the present scales.
    residual = b - (a @ r.scales[..., None])[..., 0]
    damping = 1e-4 * a.diagonal(dim1=1, dim2=2).mean(-1) + 1e-12
    change = torch.linalg.solve(a + torch.eye(groups) * damping[:, None, None], residual)
    new = fp16(r.scales + change)
    r.scales = torch.where((new > 0.5 * r.scales) & (new < 1.5 * r.scales), new, r.scales)
