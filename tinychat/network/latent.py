"""Latent attention (DeepSeek-V2, 2024) in numbers: what a layer caches of a token is one row, out of which
the keys and values of all heads are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatentConfig:
    """The parts of a layer's rows. The cached row has `rotated` values, which are the key's part that knows
    its position, and then `rank` more, which are its value too.

    rank        values that a token's keys and values are compressed to
    plain       values of a query's head that meet the compressed ones, multiplied by the head's own matrix
    rotated     values of a query's head that are rotated, behind the plain ones
    value       values that a head gives, made of what it attends to by another matrix
    query_rank  values that queries are compressed to before that; 0: they are not
    neighbours  whether files rotate neighbouring values (x[2i], x[2i + 1]); else halves
    """

    rank: int
    plain: int
    rotated: int
    value: int
    query_rank: int = 0
    neighbours: bool = True

    @property
    def query(self) -> int:
        """Values of a query's head."""
        return self.plain + self.rotated

    @property
    def row(self) -> int:
        """Values of a cached row."""
        return self.rotated + self.rank

    def rotation(self) -> np.ndarray:
        """Where the rotated values lie in files, in our order (halves): int64 [rotated]."""
        own = np.arange(self.rotated)
        return own.reshape(-1, 2).T.reshape(-1) if self.neighbours else own

    def key_rows(self, heads: int) -> np.ndarray:
        """Rows of files' `kv_b_proj` that make keys, head after head: int64 [heads · plain]."""
        return self._each(heads)[:, : self.plain].reshape(-1)

    def value_rows(self, heads: int) -> np.ndarray:
        """Those that make values: int64 [heads · value]."""
        return self._each(heads)[:, self.plain :].reshape(-1)

    def _each(self, heads: int) -> np.ndarray:
        return np.arange(heads * (self.plain + self.value)).reshape(heads, -1)
