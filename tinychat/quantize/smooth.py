"""SmoothQuant (Xiao et al., ICML 2023): 8-bit weights and activations, with loud channels moved from the
activations into the weights.

Activations that are rounded with one scale for a whole token lose their quiet channels where another one is
a hundred times as loud. Each input channel j of the linears that share an input is divided by
s_j = max|X_j|^α / max|W_j|^(1−α) and the weights' column is multiplied by it; what lies before takes the
division. How much is moved, α, is searched for each such set of linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.quantize.block import QuantizedBlock, round_to_nearest
from tinychat.quantize.folding import bounded, exact_in_norm, norm16, of_rows
from tinychat.quantize.forward import Forward, Group, Half
from tinychat.quantize.grids import Grid
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.rounding import nearest

if TYPE_CHECKING:
    import torch

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LIMIT = 256.0  # scales stay within 1/256…256


def per_token(x: torch.Tensor) -> torch.Tensor:
    """Activations as W8A8 formats promise them: int8 with one scale for each token. x: float32 […, in]."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    return (x / scale).round_().mul_(scale)


@dataclass(frozen=True)
class SmoothQuantizer:
    """Quantizes blocks one by one; what they read are the float network's activations.

    grid    of a linear of so many inputs
    alphas  that are tried beside no smoothing at all
    judge   windows whose outputs say which is best
    batch   windows in one forward pass
    """

    forward: Forward
    grid: Callable[[int], Grid]
    alphas: tuple[float, ...] = ALPHAS
    judge: int = 2
    batch: int = 8

    def __call__(self, w: BlockWeights, x: torch.Tensor) -> tuple[QuantizedBlock, torch.Tensor]:
        """w: the float block (not changed). x [S, T, H]: its input, overwritten. Returns the quantized block
        and the float block's output.
        """
        w = w.copy()
        for half in self.forward.halves(w.layer):
            for group in half.groups:
                if group.norm or group.rows:
                    self._fold(group, w, self._scales(half, group, w, x))
            for b in range(0, len(x), self.batch):
                x[b : b + self.batch] = self.forward.value(half.end, w, {half.start: x[b : b + self.batch]})
        w.bias = {k: v.half().float() for k, v in w.bias.items()}
        return round_to_nearest(w, self.grid, self.forward.cfg), x

    def _scales(self, half: Half, group: Group, w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
        """The best scales s [in] of a group's inputs."""
        import torch

        loudest, few = None, []
        for b in range(0, len(x), self.batch):
            read = self.forward.value(group.input, w, {half.start: x[b : b + self.batch]})
            highest = read.abs().amax((0, 1))
            loudest = highest if loudest is None else loudest.maximum(highest)
            if b < self.judge:
                few.append(read[: self.judge - b].flatten(0, 1))
        assert loudest is not None  # there is a window
        inputs = torch.cat(few)
        weights = [w.linear[n] for n in group.names]
        columns = torch.stack([v.abs().amax(0) for v in weights]).amax(0).clamp_min(1e-5)
        wanted = [inputs @ v.T for v in weights]
        best, least = torch.ones_like(columns), float("inf")
        for alpha in (None, *self.alphas):
            s = torch.ones_like(columns)
            if alpha is not None:
                s = loudest.clamp_min(1e-5).pow(alpha) / columns.pow(1 - alpha)
                s = exact_in_norm(group, w, bounded(s, group, LIMIT), self.forward.cfg)
            rounded, error = per_token(inputs / s), 0.0
            for v, y in zip(weights, wanted, strict=True):
                got = rounded @ nearest(v * s, self.grid(v.shape[1])).dequantize().T
                error += float((got - y).pow(2).mean() / y.pow(2).mean().clamp_min(1e-12))
            if error < least:
                best, least = s, error
        return best

    def _fold(self, group: Group, w: BlockWeights, s: torch.Tensor) -> None:
        """Multiply the group's columns by s and divide what lies before by it: the function stays."""
        for name in group.names:
            w.linear[name] = w.linear[name] * s
        if group.norm is not None:
            w.norm[group.norm] = norm16(group.norm, w.norm[group.norm] / s, self.forward.cfg)
        if group.rows is not None:
            rows = of_rows(s, group)
            w.linear[group.rows] = w.linear[group.rows] / rows[:, None]
            if group.rows in w.bias:
                w.bias[group.rows] = w.bias[group.rows] / rows
