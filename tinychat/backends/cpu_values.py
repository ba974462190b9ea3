"""What the CPU's recorder hands from op to op: buffers, and the forms in which they hold a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinychat.network.config import AttentionConfig, RopeConfig

ROWS = 8  # of integers, in a block of their own


@dataclass(eq=False)
class Buffer:
    """Memory that an op writes and later ones read. `rows`: what linears read; else plain fp32."""

    cols: int
    rows: bool = False
    as_float: bool = False
    bits: int = 0  # integers of 8 or 16 bits
    group: int = 0  # whose sums the readers' weights need
    routes: Routes | None = None  # its rows are their slots
    heads: int = 0  # it has a step's rows for each of so many heads
    native: Any = None
    first: int = -1
    last: int = -1

    def key(self) -> tuple:
        """Buffers with the same key may take each other's place."""
        experts = self.routes and self.routes.key()
        return self.cols, self.rows, self.as_float, self.bits, self.group, experts, self.heads

    def allocate(self, program: Any) -> Any:
        n = self.routes.native.slots if self.routes else 0
        n = self.heads * -(-program.max_rows // ROWS) * ROWS if self.heads else n
        if self.rows:
            return program.rows(self.cols, self.as_float, self.bits, self.group, n)
        return program.floats(self.cols, n)


@dataclass(eq=False)
class Routes:
    """Choice of experts for each row. A buffer too: one layer's may take the place of another's."""

    n_experts: int
    taken: int
    native: Any = None
    first: int = -1
    last: int = -1

    def key(self) -> tuple:
        return "routes", self.n_experts, self.taken

    def allocate(self, program: Any) -> Any:
        return program.routes(self.n_experts, self.taken)


@dataclass(eq=False)
class Value:
    """A handle: `floats` holds it in fp32, `rows` as linears read it; either may be missing.

    tail: only the rows that get logits, moved to the front. changed: the floats of `rows` are no longer those
    that what wrote them has put into integers.
    """

    cols: int
    floats: Buffer | None = None
    rows: Buffer | None = None
    tail: bool = False
    consumed: bool = False
    changed: bool = False


@dataclass(eq=False)
class Heads:
    """A part of a qkv value, and how it is to be rotated."""

    qkv: Value
    attention: AttentionConfig
    rope: RopeConfig | None = None


@dataclass(eq=False)
class Record:
    uses: list[Buffer | Routes]
    emit: Callable[[Any], None]
