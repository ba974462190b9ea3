"""One memory of a model on the device: its pool of blocks, and the scores of its slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinychat.kernels_cuda.attention import STRETCH, Attention, Shape
from tinychat.kernels_cuda.driver import Device, Memory
from tinychat.kernels_cuda.inputs import Extent, Sequence
from tinychat.kernels_cuda.modules import Modules

NOTHING = Memory(0, 0)


class Blocks:
    """Blocks of one size. There are none until `resize`."""

    def __init__(self, device: Device, shape: Any):
        """shape: has their `block_bytes`."""
        self.shape, self._device = shape, device
        self.blocks = NOTHING
        self.n_blocks = 0

    def resize(self, n_blocks: int) -> None:
        """A pool of so many blocks, zeroed; if it grows, what it held stays."""
        size, before = n_blocks * self.shape.block_bytes, self.blocks
        if before.size >= size:
            self.blocks = before = NOTHING
            self.n_blocks = 0
        blocks = self._device.allocate(size)
        self._device.clear(blocks)
        if before.size:
            self._device.copy(blocks[: before.size], before)
        self._device.synchronize()
        self.blocks, self.n_blocks = blocks, n_blocks

    def block(self, i: int) -> Memory:
        """One of them."""
        size = self.shape.block_bytes
        return self.blocks[i * size : (i + 1) * size]


class Pool(Blocks):
    """Blocks of 16 slots for the layers that share a memory."""

    shape: Shape

    def __init__(self, modules: Modules, shape: Shape, workspace: Memory):
        """workspace: as attention takes it."""
        super().__init__(modules.device, shape)
        self.attention = Attention(modules, shape, workspace)
        self.scores = NOTHING

    # Scores: float32 [planes of all watched sequences, layers, kv_heads, slots that a step may have]

    def reserve_scores(self, extent: Extent, sequences: list[Sequence]) -> bool:
        """Room for a step's; whether they lie elsewhere now."""
        need = 4 * int(np.prod(self._score_shape(extent, sequences)))
        if self.scores.size >= need:
            return False
        self.scores = NOTHING
        self.scores = self._device.allocate(need)
        return True

    def put_scores(self, extent: Extent, sequences: list[Sequence]) -> None:
        """Upload the arrays to which rows' scores are added, one after the other where a sequence has one
        plane.
        """
        _, *shape = self._score_shape(extent, sequences)
        for plane, s, scores in _watched(sequences):
            if not s.apart:
                put = np.zeros(shape, np.float32)
                n = min(scores.shape[-1], put.shape[-1])
                put[..., :n] = scores[0, ..., :n]
                self._device.upload(self.scores[plane * put.nbytes :], put)

    def fetch_scores(self, extent: Extent, sequences: list[Sequence]) -> None:
        """Fetch the scores into the arrays that asked."""
        got = np.empty(self._score_shape(extent, sequences), np.float32)
        self._device.download(got, self.scores)
        self._device.synchronize()
        for plane, s, scores in _watched(sequences):
            n, own = min(scores.shape[-1], got.shape[-1]), got[plane : plane + s.planes]
            if s.apart:
                scores[..., :n] += own[..., :n]
            else:
                scores[..., :n] = own[..., :n]

    def _score_shape(self, extent: Extent, sequences: list[Sequence]) -> tuple[int, ...]:
        planes = sum(s.planes for s in sequences)
        return planes, self.shape.layers, self.shape.kv_heads, extent.stretches * STRETCH


def _watched(sequences: list[Sequence]) -> Iterator[tuple[int, Sequence, np.ndarray]]:
    """Those whose attention is scored, each with its first plane and its scores."""
    plane = 0
    for s in sequences:
        if s.scores is not None and s.planes:
            yield plane, s, s.scores
            plane += s.planes
