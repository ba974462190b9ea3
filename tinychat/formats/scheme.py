"""What a scheme of quantization is: which tensors a module has in it, and how they become codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats import nibbles
from tinychat.formats.tensors import FLOATS, PULL_AGAIN, Tensor, Tensors
from tinychat.network.weight_form import ROW, Coded, Form, Numbers
from tinychat.network.weights import QuantizedLinear


@dataclass(frozen=True)
class Grid:
    """Integers that a module may be stored in: their bits, and the inputs that share a scale (-1: the row).

    zeros  whether zero points must be there; None: they are where they are
    """

    bits: int
    group: int = -1
    zeros: bool | None = None


@dataclass(frozen=True)
class Quantization:
    """What a folder's settings say about its quantized modules, where their tensors cannot.

    method   as messages and `show` name it
    schemes  names of the schemes (`quantized.SCHEMES`) that its modules may be stored in
    grids    integers that its modules may be stored in, that of most modules first; none for other codes
    blocks   outputs × inputs that share a scale, in each of the sizes that modules may have; ROW: all of them
    version  GPTQ: 1 stores zero - 1, 2 stores zero
    order    AWQ: whether eight outputs lie interleaved
    file     the name of the file with the weights, where the settings say it
    """

    method: str
    schemes: tuple[str, ...]
    grids: tuple[Grid, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    version: int = 1
    order: bool = True
    file: str | None = None

    def needs_zeros(self, bits: int) -> bool:
        """Whether modules of so many bits must have zero points, by every scheme of the settings."""
        return all(g.zeros for g in self.grids if g.bits == bits)


@dataclass(frozen=True)
class Module:
    """A quantized module that has not been read: its name, its shape [n, k] and its tensors."""

    tensors: Tensors
    said: Quantization
    name: str
    n: int
    k: int

    def has(self, part: str) -> bool:
        """Whether there is such a tensor."""
        return f"{self.name}.{part}" in self.tensors

    def part(self, part: str, shape: tuple[int, ...], *dtypes: str) -> Tensor:
        """A tensor that must be there in this shape and one of these dtypes; else CheckpointError says so."""
        name = f"{self.name}.{part}"
        self.tensors.check(name, shape, dtypes)
        return self.tensors[name]

    def numbers(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """The same for floats."""
        return self.part(part, shape, *FLOATS)

    def peek(self, part: str) -> Tensor:
        """A tensor that must be there, whatever it is."""
        return self.tensors[f"{self.name}.{part}"]

    def group(self, groups: int) -> int:
        """The word of `Form` for so many groups."""
        return ROW if groups == 1 else self.k // groups

    def pick(self, shapes: Callable[[int, int], dict[str, tuple[int, ...]]]) -> tuple[Grid, int]:
        """The grid of the settings whose shapes, by bits and groups, this module's tensors have; its groups.

        Where none has, the first one that divides the inputs, so that the tensor that is amiss can be named.
        Raises UnsupportedModelError if none divides them, CheckpointError where there is none.
        """
        fitting = []
        for grid in self.said.grids:
            group = self.k if grid.group == -1 else grid.group
            if self.k % group == 0:
                fitting.append((grid, self.k // group))
        if not fitting:
            sizes = ", ".join(str(g.group) for g in self.said.grids) or "none"
            raise UnsupportedModelError(
                f"{self.name} is {self.n} × {self.k}, which the group size {sizes} does not divide.",
                "Quantize the model again with a group size that divides it (128, 64 or 32).",
            )
        for grid, groups in fitting:
            expected = shapes(grid.bits, groups)
            if all(self.has(p) and self.peek(p).shape == shape for p, shape in expected.items()):
                return grid, groups
        return fitting[0]

    def whole(self, count: int, bits: int, what: str) -> int:
        """The words that so many codes fill; ValueError where the last one is not full."""
        if count * bits % 32:
            raise ValueError(f"{count} {what} of {bits} bits do not fill whole words")
        return nibbles.width(count, bits)


@dataclass(frozen=True)
class Stored:
    """A module whose tensors have been checked: the form they hold, and how to read them.

    `read` raises ValueError for content that makes no sense.
    """

    form: Form
    read: Callable[[], QuantizedLinear]


@dataclass(frozen=True)
class Scheme:
    """One way in which a module is stored.

    name    as settings and tests name it
    codes   the part that holds the codes, and its dtypes in safetensors' spelling
    needs   parts that tell this scheme from others with the same codes
    also    parts that may be there
    look    checks all tensors of a module by their headers, and says what is stored
    """

    name: str
    codes: str
    dtypes: tuple[str, ...]
    needs: tuple[str, ...]
    look: Callable[[Module], Stored]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scales:
    """Scales of a module that have been found in one of the shapes that they may have beside a weight [n, k].

    rows     outputs that share one
    shape    [n / rows, C] as stored
    columns  the column of each group's scale, where a last block is cut and groups are smaller than blocks
    kind     the word of `Form`
    """

    tensor: Tensor
    rows: int
    shape: tuple[int, int]
    kind: str
    columns: np.ndarray | None = None

    def read(self) -> Numbers:
        """Scales as stored [n / rows, groups]."""
        if self.kind == "e8m0":
            return Coded("e8m0", self.spread(self.tensor.read()))
        return self.spread(self.tensor.numbers())

    def spread(self, beside: np.ndarray) -> np.ndarray:
        """What is stored in the tensor's shape as [n / rows, groups]."""
        beside = beside.reshape(self.shape)
        return np.ascontiguousarray(beside if self.columns is None else beside[:, self.columns])

    def form(self, m: Module, bits: int, decoding: str, offset: str = "none") -> Form:
        """Form of a module with these scales."""
        groups = self.shape[1] if self.columns is None else len(self.columns)
        rows = ROW if self.rows == m.n > 1 else self.rows
        return Form(bits, decoding, m.group(groups), self.kind, offset, rows)


WHOLE, ROWS = (ROW, ROW), (1, ROW)  # blocks of `Quantization`: one for all weights, one for each output
POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two


def scales_of(m: Module, part: str, powers: bool = False) -> Scales:
    """The scales of a module, in the shape of one of the blocks that the settings name.

    powers  whether they may be powers of two
    Raises CheckpointError for another shape.
    """
    t, n, k = m.peek(part), m.n, m.k
    m.part(part, t.shape, *FLOATS, *(POWERS if powers else ()))
    kind = "e8m0" if t.dtype in POWERS else t.kind
    for over in m.said.blocks:
        rows, inputs = over[0] or n, over[1] or k
        shape = (-(-n // rows), -(-k // inputs))
        if (
            t.shape == shape
            or (over == WHOLE and t.shape in ((), (1,)))
            or (over == ROWS and t.shape == (n,))
        ):
            group = math.gcd(k, inputs)
            cut = None if shape[1] * inputs == k else np.arange(k // group) * group // inputs
            return Scales(t, rows, shape, kind, cut)
    raise CheckpointError(
        f"{m.name}.{part} has the shape {list(t.shape)}, which no scales of {n} × {k} weights have.",
        PULL_AGAIN,
    )
