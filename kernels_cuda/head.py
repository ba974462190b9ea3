"""The output head: logits of a step's last rows, and what of them goes back to the host."""

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
    """Of 4 bytes, that a row of logits comes to: all of them, the first id of the largest, or LARGEST ids,
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
        """Memory for results."""
        d, vocab = self.modules.device, self.weight.shape.n
        self._kernels = {name: self.modules.kernel("logits.cu", name) for name in (ARGMAX, TOP)}
        self._results: dict[str, tuple[Memory, np.ndarray]] = {}
        for wanted, rows in ((LOGITS, PINNED), (ARGMAX, ROWS), (TOP, ROWS)):
            n = columns(wanted, vocab)
            pinned = d.pinned((rows, n), np.float32 if wanted == LOGITS else np.int32)
            self._results[wanted] = d.allocate(4 * ROWS * n), pinned

    def launch(self, step: Memory, wanted: str, row: int, n: int) -> None:
        """Rows row … row + n - 1 of the step, ROWS at most."""
        d, vocab, logits = self.modules.device, self.weight.shape.n, self._results[LOGITS][0]
        linear.launch(
            self.modules, self.weight, self.x.memory[row * self.x.row_bytes :], logits, n, vocab,
            scale=self.scale, cap=self.cap,
        )  # fmt: skip
        if wanted == ARGMAX:
            d.launch(self._kernels[ARGMAX], (n,), 1024, logits, self._results[ARGMAX][0], vocab)
        elif wanted == TOP:
            d.launch(self._kernels[TOP], (n,), 1024, step, logits, self._results[TOP][0], vocab)

    def fetch(self, wanted: str, to: np.ndarray) -> None:
        """What was launched last, for the first len(to) rows: [rows, columns]."""
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
