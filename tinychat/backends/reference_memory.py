"""The memories of the torch reference: fp32 pools of KV blocks and of states."""

from __future__ import annotations

import numpy as np
import torch

from tinychat.backends.interface import BLOCK, MemorySpec
from tinychat.base.errors import MemoryBudgetError
from tinychat.network.config import RopeConfig

Exact = np.ndarray | None  # as of `Backend.move_slots`


def quantize_kv(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., head_dim] as an 8-bit cache gives them back: int8 with an fp16 scale for each 32
    channels.
    """
    parts = []
    for g in x.split(32, dim=-1):
        scale = (g.abs().amax(-1, keepdim=True) * np.float32(1 / 127)).half().float()
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        parts.append((g * inverse).round().clamp(-128, 127) * scale)
    return torch.cat(parts, dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves convention, over the first dimensions that cos and sin have pairs for."""
    n = cos.shape[-1]
    a, b, rest = x.split([n, n, x.shape[-1] - 2 * n], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def pool_slots(block_table: np.ndarray) -> torch.Tensor:
    """Pool slots of the logical ones."""
    table = torch.from_numpy(block_table.astype(np.int64))
    return (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def spread(values: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    """How far values [layers, kv_heads, n, dim] lie from their weighted mean: `Backend.value_spread`."""
    w = torch.from_numpy(weights)
    w = torch.where(w.sum(2, keepdim=True) > 0, w, 1.0)
    mean = (w[..., None] * values).sum(2, keepdim=True) / w.sum(2)[..., None, None]
    return (values - mean).norm(dim=3).numpy()


def _empty(*shape: int) -> torch.Tensor:
    try:
        return torch.empty(shape)
    except RuntimeError as e:  # what torch says where memory ends
        raise MemoryBudgetError("There is no memory for the KV cache.", "Ask for a smaller --ctx.") from e


class KvPool:
    """Keys and values of one paged or window memory: float32 [2, layers, slots, kv_heads, head_dim]; of rows
    that are both, [1, …].
    """

    def __init__(self, spec: MemorySpec, bits: int):
        """bits: 32, or 16 or 8 to keep keys and values as the fast backends do."""
        self.spec, self.bits = spec, bits
        self.kv = torch.empty(spec.sides, len(spec.layers), 0, spec.kv_heads, spec.head_dim)
        self.bytes_per_block = spec.sides * len(spec.layers) * BLOCK * spec.kv_heads * spec.head_dim * 4

    def allocate(self, n_blocks: int) -> None:
        before, (sides, layers, _, *head) = self.kv, self.kv.shape
        self.kv = _empty(sides, layers, n_blocks * BLOCK, *head)
        if before.shape[2] < self.kv.shape[2]:
            self.kv[:, :, : before.shape[2]] = before

    def copy(self, src: int, dst: int) -> None:
        blocks = self.kv.unflatten(2, (-1, BLOCK))
        blocks[:, :, dst] = blocks[:, :, src]

    def read(self, table: np.ndarray) -> np.ndarray:
        blocks = self.kv.unflatten(2, (-1, BLOCK)).permute(2, 0, 1, 3, 4, 5)[table.tolist()]
        return blocks.flatten(1).contiguous().numpy().view(np.uint8)

    def write(self, table: np.ndarray, data: np.ndarray) -> None:
        blocks = self.kv.unflatten(2, (-1, BLOCK))  # [sides, layers, blocks, BLOCK, kv_heads, head_dim]
        shape = (len(table), *blocks.shape[:2], *blocks.shape[3:])
        given = torch.from_numpy(data.view(np.float32).reshape(shape).copy())
        blocks[:, :, table.tolist()] = given.permute(1, 2, 0, 3, 4, 5)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values as the cache gives them back [..., head_dim]."""
        if self.bits == 32:
            return x
        x = x.clamp(-65504, 65504).half().float()
        return x if self.bits == 16 else quantize_kv(x)

    # What eviction asks for. slots, exact: as of `Backend.move_slots`; only caches of 4 bits need them.

    def move_slots(
        self, table: np.ndarray, src: np.ndarray, dst: np.ndarray, slots: int = 0, exact: Exact = None
    ) -> None:
        layer, head, i = np.nonzero(src >= 0)
        to, from_ = (pool_slots(table)[a[layer, head, i]] for a in (dst, src))
        self.kv[:, layer, to, head] = self.kv[:, layer, from_, head]

    def value_spread(self, table: np.ndarray, weights: np.ndarray, exact: Exact = None) -> np.ndarray:
        values = self.kv[-1, :, pool_slots(table)[: weights.shape[2]]].transpose(1, 2)
        return spread(values[..., -self.spec.latent :], weights)  # all of them where nothing is latent

    def turn_keys(
        self, table: np.ndarray, delta: np.ndarray, ropes: list[RopeConfig | None], exact: Exact = None
    ) -> None:
        """ropes: of each layer."""
        slots = pool_slots(table)[: delta.shape[2]]
        for layer, rope in enumerate(ropes):
            if rope is None:
                continue
            keys = self.kv[0, layer, slots]  # [slots, kv_heads, dim]
            frequencies = torch.from_numpy(rope.frequencies())
            angle = torch.from_numpy(delta[layer]).double().T[..., None] * frequencies
            self.kv[0, layer, slots] = self.stored(rotate(keys, angle.cos().float(), angle.sin().float()))


class StatePool:
    """States of sequences: float32 [slots, layers, values of a layer]. A block is a slot of one state."""

    def __init__(self, spec: MemorySpec):
        self.spec, self.bytes_per_block = spec, spec.state_bytes
        self.states = torch.empty(0, len(spec.layers), spec.state_bytes // 4 // len(spec.layers))

    def allocate(self, n_slots: int) -> None:
        before = self.states
        self.states = _empty(n_slots, *before.shape[1:])
        if len(before) < n_slots:
            self.states[: len(before)] = before

    def copy(self, src: int, dst: int) -> None:
        self.states[dst] = self.states[src]

    def read(self, table: np.ndarray) -> np.ndarray:
        return self.states[table.tolist()].numpy().reshape(len(table), -1).view(np.uint8)

    def write(self, table: np.ndarray, data: np.ndarray) -> None:
        given = torch.from_numpy(data.view(np.float32).reshape(len(table), *self.states.shape[1:]).copy())
        self.states[table.tolist()] = given
