"""Grids: the levels that the weights of a group may have, and how a format stores them.

A weight of code q is `q · scale + offset`. Scale and offset of a group come of its *parts*, tensors with one
value for each group: what a file stores beside the codes. Which parts there are, which of them are numbers
that can be moved a little, and which values they may have is what the kinds of grid differ in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinychat.network.weight_form import SUPER, Coded
from tinychat.network.weights import QuantizedLinear

if TYPE_CHECKING:
    import torch

Parts = tuple["torch.Tensor", ...]
MIN_SCALE = 1e-6  # still a normal-enough fp16 number
# Candidate ranges, as fractions of the whole one: the fewer levels, the more is gained by clipping. Above 1,
# since a zero point that is an integer cannot put both ends on levels, and what is passed on widens groups:
# the error on text that was not calibrated on falls by 5 % at 4 bits and groups of 32.
SHRINK = {
    2: (1.0, 0.92, 0.84, 0.77, 0.7, 0.63, 0.56, 0.5, 0.44, 0.38),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52),
    4: (1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74),
    5: (1.04, 1.0, 0.97, 0.93, 0.89, 0.84),
    8: (1.01, 1.0, 0.99),
}


def fp16(scale: torch.Tensor) -> torch.Tensor:
    """Positive scales rounded to what fp16 holds, as float32."""
    return scale.clamp(MIN_SCALE, 65504.0).half().float()


def signed16(number: torch.Tensor) -> torch.Tensor:
    """Numbers of either sign rounded to what fp16 holds, as float32."""
    return number.clamp(-65504.0, 65504.0).half().float()


@dataclass(frozen=True)
class Grid:
    """Integer zero points: `w = (q - zero) · scale`; parts are scale (fp16) and zero.

    bits    of a code
    group   inputs that share scale and zero
    lowest  smallest zero point
    """

    bits: int = 4
    group: int = 64
    lowest: int = 0

    moving = 1  # the first so many parts are numbers that least squares may move
    least = 0  # smallest code

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def span(self) -> int:
        """Inputs that share the moving parts."""
        return self.group

    def values(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and offsets, exact in float32, of parts in any shape."""
        scale, zero = parts
        return scale, -zero * scale

    def whole(self, w: torch.Tensor, shared: Parts) -> Parts:
        """The parts that span the whole range of groups w [group, out]: each [out]. shared: what `shared`
        gave for them.
        """
        lo, hi = w.amin(0).clamp_max(0), w.amax(0).clamp_min(0)
        if self.lowest:
            lo = lo.minimum(-hi * self.lowest / (self.levels - self.lowest))
        scale = fp16((hi - lo) / self.levels)
        return scale, (-lo / scale).round().clamp(self.lowest, self.levels)

    def candidates(self, w: torch.Tensor, shared: Parts) -> Parts:
        """Parts worth trying for groups w [group, out], each [C, out]: ranges from the whole one down, each
        at four zero points around the one that clips both ends alike.
        """
        import torch

        lo, hi = w.amin(0).clamp_max(0), w.amax(0).clamp_min(0)
        scale = fp16((hi - lo) / self.levels * torch.tensor(SHRINK[self.bits])[:, None])
        middle = (self.levels / 2 - (hi + lo) / 2 / scale).floor()
        zeros = middle[:, None] + torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None]
        zeros = zeros.clamp(self.lowest, self.levels)
        return scale[:, None].expand_as(zeros).flatten(0, 1), zeros.flatten(0, 1)

    def shared(self, w: torch.Tensor, weight: torch.Tensor) -> Parts:
        """What the groups of one span have in common, chosen for w [span, out] before the first of them is
        rounded: each [out]. weight [span]: how much an error of each input matters. None where a span is a
        group.
        """
        return ()

    def basis(self, codes: torch.Tensor, parts: Parts) -> list[torch.Tensor]:
        """For each moving part what it is multiplied by in each weight. codes and parts [out, groups, group]
        and [out, groups]; results [out, groups, group].
        """
        return [codes - parts[1][..., None]]

    def moved(self, parts: Parts, numbers: Parts) -> Parts:
        """`parts` with the moving ones replaced by `numbers` as they are stored, where these are sane."""
        new = fp16(numbers[0])
        return _near(new, parts[0]), *parts[1:]

    def divided(self, parts: Parts, by: torch.Tensor) -> Parts:
        """The parts of rows divided by `by` [out, 1]: codes stay."""
        return fp16(parts[0] / by), *parts[1:]

    def linear(self, codes: np.ndarray, parts: Parts) -> QuantizedLinear:
        """The weight that is written. codes uint8 [out, in]; parts [out, groups]."""
        scale, zero = (p.numpy() for p in parts)
        return QuantizedLinear(codes, scale.astype(np.float16), zeros=zero.astype(np.uint8), bits=self.bits)


@dataclass(frozen=True)
class Symmetric(Grid):
    """Zero in the middle, at 2^(bits - 1): `w = (q - half) · scale`.

    signed   the scale may be negative, which puts the one level more on the other side
    cropped  the smallest code is not used, so that negated codes are codes
    """

    signed: bool = False
    cropped: bool = False

    @property
    def least(self) -> int:  # type: ignore[override]
        return 1 if self.cropped else 0

    @property
    def half(self) -> int:
        """The zero point."""
        return 1 << (self.bits - 1)

    def whole(self, w: torch.Tensor, shared: Parts) -> Parts:
        import torch

        steps = self.half - 1 if self.cropped else self.levels / 2
        scale = fp16(w.abs().amax(0) / steps)
        return scale, torch.full_like(scale, self.half)

    def candidates(self, w: torch.Tensor, shared: Parts) -> Parts:
        import torch

        size = w.abs().amax(0)
        steps = [1 / self.half, 1 / (self.half - 0.5), *(s / (self.half - 1) for s in SHRINK[self.bits])]
        scale = fp16(torch.tensor(steps)[:, None] * size)
        if self.signed:
            scale = torch.cat([scale, -scale])
        return scale, torch.full_like(scale, self.half)

    def moved(self, parts: Parts, numbers: Parts) -> Parts:
        return _near(signed16(numbers[0]), parts[0]), parts[1]

    def divided(self, parts: Parts, by: torch.Tensor) -> Parts:
        scale = parts[0]
        return fp16(scale.abs() / by) * scale.sign(), parts[1]


@dataclass(frozen=True)
class Offsets(Grid):
    """An fp16 offset beside the scale: `w = q · scale + offset`; parts are both."""

    moving = 2

    def values(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        return parts[0], parts[1]

    def whole(self, w: torch.Tensor, shared: Parts) -> Parts:
        lo, hi = w.amin(0), w.amax(0)
        return fp16((hi - lo) / self.levels), signed16(lo)

    def candidates(self, w: torch.Tensor, shared: Parts) -> Parts:
        scale, offset = _shifted(w.amin(0), w.amax(0), self)
        return fp16(scale), signed16(offset)

    def basis(self, codes: torch.Tensor, parts: Parts) -> list[torch.Tensor]:
        import torch

        return [codes, torch.ones_like(codes)]

    def moved(self, parts: Parts, numbers: Parts) -> Parts:
        """Scale and offset belong together: both move or neither."""
        scale, offset = fp16(numbers[0]), signed16(numbers[1])
        sane = (scale > 0.5 * parts[0]) & (scale < 1.5 * parts[0])
        return scale.where(sane, parts[0]), offset.where(sane, parts[1])

    def divided(self, parts: Parts, by: torch.Tensor) -> Parts:
        return fp16(parts[0] / by), signed16(parts[1] / by)

    def linear(self, codes: np.ndarray, parts: Parts) -> QuantizedLinear:
        scale, offset = (p.numpy().astype(np.float16) for p in parts)
        return QuantizedLinear(codes, scale, offsets=offset, bits=self.bits)


@dataclass(frozen=True)
class SixBit(Grid):
    """llama.cpp's Q4_K: groups of 32 with 6-bit scale and minimum, eight of which share an fp16 for each.

    w = d · s · q - dmin · m        parts are d, dmin, s (1…63) and m (0…63)
    """

    group: int = 32

    moving = 2

    @property
    def span(self) -> int:
        return SUPER

    def values(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        d, dmin, s, m = parts
        return d * s, -dmin * m

    def whole(self, w: torch.Tensor, shared: Parts) -> Parts:
        d, dmin, s, m = self.candidates(w, shared)
        return d[0], dmin[0], s[0], m[0]

    def shared(self, w: torch.Tensor, weight: torch.Tensor) -> Parts:
        groups = w.view(-1, self.group, w.shape[1])
        scale, offset = _shifted(groups.amin(1).clamp_max(0), groups.amax(1), self)  # [C, groups, out]
        offset = offset.clamp_max(0)
        q = ((groups - offset[:, :, None]) / scale.clamp_min(MIN_SCALE)[:, :, None]).round_()
        e = q.clamp_(0, self.levels).mul_(scale[:, :, None]).add_(offset[:, :, None]).sub_(groups)
        error = (e.square_() * weight.view(1, -1, self.group, 1)).sum(2)
        best = error.argmin(0, keepdim=True)
        scale, offset = scale.gather(0, best)[0], offset.gather(0, best)[0]
        return fp16(scale.amax(0) / 63), signed16(-offset.amin(0) / 63).clamp_min(0)

    def candidates(self, w: torch.Tensor, shared: Parts) -> Parts:
        d, dmin = shared
        scale, offset = _shifted(w.amin(0).clamp_max(0), w.amax(0).clamp_min(0), self)
        s = (scale / d).round().clamp(1, 63)
        m = (-offset / dmin.clamp_min(MIN_SCALE)).round().clamp(0, 63)
        return d.expand_as(s), dmin.expand_as(s), s, m

    def basis(self, codes: torch.Tensor, parts: Parts) -> list[torch.Tensor]:
        import torch

        return [codes * parts[2][..., None], -parts[3][..., None] * torch.ones_like(codes)]

    def moved(self, parts: Parts, numbers: Parts) -> Parts:
        d, dmin = fp16(numbers[0]), signed16(numbers[1]).clamp_min(0)
        sane = (d > 0.7 * parts[0]) & (d < 1.3 * parts[0])
        sane &= (dmin >= 0.5 * parts[1]) & (dmin <= 1.5 * parts[1])
        return d.where(sane, parts[0]), dmin.where(sane, parts[1]), *parts[2:]

    def divided(self, parts: Parts, by: torch.Tensor) -> Parts:
        return fp16(parts[0] / by), signed16(parts[1] / by), *parts[2:]

    def linear(self, codes: np.ndarray, parts: Parts) -> QuantizedLinear:
        d, dmin = (p.numpy()[:, :: SUPER // self.group].astype(np.float16) for p in parts[:2])
        s, m = (p.numpy().astype(np.uint8) for p in parts[2:])
        return QuantizedLinear(codes, Coded("int6", s, d), offsets=Coded("int6", m, -dmin), bits=self.bits)


def _shifted(lo: torch.Tensor, hi: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of ranges from lo…hi down, each at three places around its middle: [C, …]."""
    import torch

    shape = (-1, 1, *[1] * lo.dim())
    shrink = torch.tensor(SHRINK[grid.bits]).view(shape)
    scale = (hi - lo) / grid.levels * shrink
    place = torch.tensor([0.0, -0.5, 0.5]).view(1, -1, *[1] * lo.dim())
    offset = (hi + lo) / 2 - (grid.levels / 2 + place) * scale
    return scale.expand_as(offset).flatten(0, 1), offset.flatten(0, 1)


def _near(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` where it is within half of `old`, else `old`."""
    ratio = new / old
    return new.where((ratio > 0.5) & (ratio < 1.5), old)
