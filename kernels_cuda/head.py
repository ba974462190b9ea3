"""The output head: logits of the rows that are asked for, and what of them goes back to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.kernels_cuda import linear
from tinychat.kernels_cuda.driver import Memory
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.modules import Modules

ROWS = 64  # at once: a large vocabulary takes half a megabyte a row
PINNED = 16  # rows of logits that are copied by way of pinned memory
LARGEST = 256  # src/logits.cu

LOGITS, ARGMAX, TOP = "logits", "argmax", "largest"


def columns(wanted: str, vocab: int) -> int:
    """Number of 4-byte values that a row returns: all logits, the first id of the largest, or LARGEST ids,
    their logits, how many they are, and the total (as in `src/logits.cu`).
    """
    return {LOGITS: vocab, ARGMAX: 1, TOP: 2 * LARGEST + 2}[wanted]


@dataclass(eq=False)
class Head:
    """The last linear and what follows it. x: where its inputs lie, known once the program is built."""

    modules: Modules
    weight: DeviceLinear
    x: Any
    scale: float
    cap: float

    def build(self) -> None:
        """Memory for results, and for rows that do not lie one behind the other."""
        d, vocab = self.modules.device, self.weight.shape.n
        self._kernels = {name: self.modules.kernel("logits.cu", name) for name in (ARGMAX, TOP)}
        self._pick = self.modules.kernel("rows.cu", "pick_rows")
        self._picked = d.allocate(ROWS * self.x.row_bytes)
        self._results: dict[str, tuple[Memory, np.ndarray]] = {}
        for wanted, rows in ((LOGITS, PINNED), (ARGMAX, ROWS), (TOP, ROWS)):
            n = columns(wanted, vocab)
            pinned = d.pinned((rows, n), np.float32 if wanted == LOGITS else np.int32)
            self._results[wanted] = d.allocate(4 * ROWS * n), pinned

    def row(self, i: int) -> Memory:
        """Inputs of row i of the step and of those behind it."""
        return self.x.memory[i * self.x.row_bytes :]

    def pick(self, asked: Memory, n: int) -> Memory:
        """Inputs of n rows of the step, ROWS at most, one behind the other. asked: int32, their numbers."""
        ld = self.x.row_bytes // 2
        self.modules.device.launch(
            self._pick, (-(-ld // 256), n), 256, self.x.memory, asked, self._picked, ld
        )
        return self._picked

    def launch(self, x: Memory, wanted: str, inverse_temperatures: Memory, n: int) -> None:
        """Launch the head on n rows' inputs, ROWS at most. inverse_temperatures: float32, each row's, for
        TOP.
        """
        d, vocab, logits = self.modules.device, self.weight.shape.n, self._results[LOGITS][0]
        linear.launch(self.modules, self.weight, x, logits, n, vocab, scale=self.scale, cap=self.cap)
        if wanted == ARGMAX:
            d.launch(self._kernels[ARGMAX], (n,), 1024, logits, self._results[ARGMAX][0], vocab)
        elif wanted == TOP:
            d.launch(
                self._kernels[TOP], (n,), 1024, inverse_temperatures, logits, self._results[TOP][0], vocab
            )

    def fetch(self, wanted: str, to: np.ndarray) -> None:
        """Fetch what was launched last, for the first len(to) rows: [rows, columns]."""
        source, pinned = self._results[wanted]
        through = pinned[: len(to)] if len(to) <= len(pinned) else to
        self.modules.device.download(through, source)
        self.modules.device.synchronize()
        if through is not to:
            to[:] = through

    def logits(self, row: int) -> np.ndarray:
        """One row of what was launched last: float32 [vocab]."""
        size, to = 4 * self.weight.shape.n, np.empty(self.weight.shape.n, np.float32)
        self.modules.device.download(to, self._results[LOGITS][0][row * size :])
        self.modules.device.synchronize()
        return to
