"""The torch reference's keys and values in 4 bits: what every other backend's are compared with.

A complete block of 16 slots, its keys by channel over the slots: code · scale + offset, where scales and
offsets have 8 bits, times a half of the head each. Its values by slot over groups of 32 channels: (code +
zero) · scale, where zeros have 8 bits, and scales 8 bits of their own, so that a slot that moves takes its
value along.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tinychat.backends.interface import BLOCK, STRETCH, MemorySpec, Slots, Tails
from tinychat.backends.reference_memory import Exact, KvPool, pool_slots, rotate, spread
from tinychat.network.config import RopeConfig

GROUP = 32  # channels of a value that share a scale
LARGEST = 15  # code
TINY = 1e-30  # in place of a scale or unit that is 0
NOT_A_NUMBER = 0xFF  # code of a scale; larger than those that finite values have


class KeyGrid(NamedTuple):
    """What codes of keys mean, […, 1, kv_heads, head_dim]: code · scale + offset.

    units  what scales and offsets are multiples of, [2, …, 1, kv_heads, 1]
    """

    scale: torch.Tensor
    offset: torch.Tensor
    units: torch.Tensor

    @staticmethod
    def over(k: torch.Tensor) -> KeyGrid:
        """The grids that spread over the keys of blocks, [… slots, kv_heads, head_dim]: the nearest there
        are. Those that cut nothing off are wider, and so farther from the keys.
        """
        low = k.amin(-3, keepdim=True)
        unit = (low.abs().amax(-1, keepdim=True) * np.float32(1 / 127)).half().float()
        steps = KeyGrid._steps(k, KeyGrid._offsets(low, unit))
        units = torch.stack([(steps.amax(-1, keepdim=True) * np.float32(1 / 255)).half().float(), unit])
        return KeyGrid.within(k, units)[0]

    @staticmethod
    def within(k: torch.Tensor, units: torch.Tensor) -> tuple[KeyGrid, torch.Tensor]:
        """The grids of these units, and whether they suffice for each channel."""
        low = k.amin(-3, keepdim=True)
        offset = KeyGrid._offsets(low, units[1])
        steps = KeyGrid._steps(k, offset)
        code = torch.maximum((steps / units[0].clamp_min(TINY)).round(), (steps > 0).float())
        enough = (code <= 255) & ((low / units[1].clamp_min(TINY)).round() >= -128)
        return KeyGrid(code.clamp(0, 255) * units[0], offset, units), enough

    @staticmethod
    def _offsets(low: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        return (low / unit.clamp_min(TINY)).round().clamp(-128, 127) * unit

    @staticmethod
    def _steps(k: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return ((k.amax(-3, keepdim=True) - offset) * np.float32(1 / LARGEST)).clamp_min(0)

    def at(self, k: torch.Tensor) -> torch.Tensor:
        """Where keys lie, in steps."""
        return (k - self.offset) / self.scale.clamp_min(TINY)

    def rounded(self, k: torch.Tensor) -> torch.Tensor:
        """The nearest keys that there are codes for."""
        return self.at(k).round().clamp(0, LARGEST) * self.scale + self.offset


class Grid(NamedTuple):
    """What codes of values mean: (code + zero) · scale."""

    scale: torch.Tensor
    zero: torch.Tensor

    @staticmethod
    def over(x: torch.Tensor, dim: int) -> Grid:
        """The grid that spreads over the range of x in one dimension, which has length 1 in it."""
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        middle = (low + high) * 0.5
        # Zeros have 8 bits: far from 0 the steps are wider.
        step = torch.maximum((high - low) * np.float32(1 / LARGEST), middle.abs() * np.float32(1 / 111))
        bits = (step * 4).half().view(torch.int16).int()
        code = ((bits + 64) >> 7).clamp(1, 0xF7)
        code[step.isnan()] = NOT_A_NUMBER
        scale = (code << 7).short().view(torch.float16).float() * 0.25
        return Grid(scale, (middle / scale - LARGEST / 2).round().clamp(-128, 127))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest numbers that there are codes for."""
        code = (x / self.scale - self.zero).round().clamp(0, LARGEST)
        return (code + self.zero) * self.scale


def rounded_values(v: torch.Tensor) -> torch.Tensor:
    """Values [..., head_dim] as the cache gives them back."""
    return torch.cat([Grid.over(g, -1).rounded(g) for g in v.split(GROUP, dim=-1)], dim=-1)


class Kv4Pool(KvPool):
    """Complete blocks in 4 bits: what they give back, and the grids of the keys. Those that are read
    exactly are in `tail`, as halves.

    grids  [layers, blocks, kv_heads, head_dim + 1, 2]: scales and offsets, and behind them their units
    """

    def __init__(self, spec: MemorySpec, tail: KvPool):
        super().__init__(spec, 4)
        self.tail = tail
        self.reads_first = spec.kind == "paged"  # whether rows read the first block exactly, too
        self.grids = torch.empty(len(spec.layers), 0, spec.kv_heads, spec.head_dim + 1, 2)
        self._grid_bytes = len(spec.layers) * spec.kv_heads * (spec.head_dim + 1) * 2 * 4
        self.bytes_per_block += self._grid_bytes

    def allocate(self, n_blocks: int) -> None:
        super().allocate(n_blocks)
        before, (layers, _, *head) = self.grids, self.grids.shape
        self.grids = torch.zeros(layers, n_blocks, *head)
        kept = min(n_blocks, before.shape[1])
        self.grids[:, :kept] = before[:, :kept]

    def copy(self, src: int, dst: int) -> None:
        super().copy(src, dst)
        self.grids[:, dst] = self.grids[:, src]

    def read(self, table: np.ndarray) -> np.ndarray:
        grids = self.grids[:, table.tolist()].transpose(0, 1).contiguous().numpy()
        grids = grids.reshape(len(table), self._grid_bytes // 4).view(np.uint8)
        return np.concatenate([super().read(table), grids], axis=1)

    def write(self, table: np.ndarray, data: np.ndarray) -> None:
        blocks, grids = np.split(data, [data.shape[1] - self._grid_bytes], axis=1)
        super().write(table, np.ascontiguousarray(blocks))
        layers, _, *head = self.grids.shape
        given = np.ascontiguousarray(grids).view(np.float32).reshape(len(table), layers, *head)
        self.grids[:, table.tolist()] = torch.from_numpy(given.copy()).transpose(0, 1)

    def _grid(self, block: int) -> KeyGrid:
        """Grids of the keys of a block, all layers."""
        grids = self.grids[:, block, None]  # [layers, 1, kv_heads, head_dim + 1, 2]
        return KeyGrid(grids[..., :-1, 0], grids[..., :-1, 1], grids[..., -1:, :].movedim(-1, 0))

    def _keep_grid(self, grids: torch.Tensor, grid: KeyGrid) -> None:
        """Grids of keys to where they are kept, [… kv_heads, head_dim + 1, 2]."""
        grids[..., :-1, 0], grids[..., :-1, 1] = grid.scale.squeeze(-3), grid.offset.squeeze(-3)
        grids[..., -1:, :] = grid.units.movedim(0, -1).squeeze(-4)

    # Complete blocks. k, v: [BLOCK, kv_heads, head_dim]

    def _slots(self, block: int) -> slice:
        return slice(block * BLOCK, (block + 1) * BLOCK)

    def exact(self, layer: int, blocks: np.ndarray) -> torch.Tensor:
        """Blocks of the tail: [2, slots, kv_heads, head_dim]."""
        return self.tail.kv[:, layer, pool_slots(blocks)]

    def keep(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: Slots, tails: Tails) -> torch.Tensor:
        """Write a span's keys and values. Returns the stretches that they are written to, from the first slot
        of the first on, exactly: [2, slots, kv_heads, head_dim].
        """
        began, end = slots.length // STRETCH * STRETCH, slots.length + k.shape[0]
        before = self.exact(layer, tails.blocks[began // BLOCK : -(-slots.length // BLOCK)])
        exact = torch.cat([before[:, : slots.length - began], self.tail.stored(torch.stack([k, v]))], dim=1)
        for i in range(slots.length // BLOCK, -(-end // BLOCK)):
            own, block = exact[:, i * BLOCK - began :][:, :BLOCK], int(tails.blocks[i])
            if block >= 0:
                self.tail.kv[:, layer, block * BLOCK : block * BLOCK + own.shape[1]] = own
            if own.shape[1] == BLOCK:
                self.pack(layer, int(slots.table[i]), *own)
        return exact

    def pack_keys(self, layer: int, block: int, k: torch.Tensor, heads: torch.Tensor | slice) -> None:
        """Store the keys of a block, of these heads."""
        grid = KeyGrid.over(k[:, heads])
        self.kv[0, layer, self._slots(block)][:, heads] = grid.rounded(k[:, heads])
        kept = self.grids[layer, block, heads].clone()
        self._keep_grid(kept, grid)
        self.grids[layer, block, heads] = kept

    def pack(
        self,
        layer: int,
        block: int,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: torch.Tensor | slice = slice(None),
    ) -> None:
        """Store a block that has all of its slots, of these heads."""
        self.pack_keys(layer, block, k, heads)
        self.kv[1, layer, self._slots(block)][:, heads] = rounded_values(v[:, heads])

    # What eviction asks for

    def open_blocks(self, blocks: np.ndarray, exact: np.ndarray) -> None:
        """Blocks as they are read, into the tail."""
        self.tail.kv[:, :, pool_slots(exact)] = self.tail.stored(self.kv[:, :, pool_slots(blocks)])

    def _with_exact(self, which: int, table: np.ndarray, n: int, exact: Exact) -> torch.Tensor:
        """Keys (0) or values (1) of the first n slots [layers, n, kv_heads, head_dim]."""
        exact = np.full(len(table), -1) if exact is None else exact
        there = torch.from_numpy(np.repeat(exact[: len(table)] >= 0, BLOCK))[:n]
        found = self.kv[which][:, pool_slots(table)[:n]]
        found[:, there] = self.tail.kv[which][:, pool_slots(exact)[:n][there]]
        return found

    def move_slots(
        self, table: np.ndarray, src: np.ndarray, dst: np.ndarray, slots: int = 0, exact: Exact = None
    ) -> None:
        """A key that comes into a block takes the grid of its channel there if it fits, so that the others
        stay what they are however often that happens; else the channel gets another one. Values keep theirs.
        Blocks that are read exactly take exactly what comes, and are stored in 4 bits anew.
        """
        exact = np.full(len(table), -1) if exact is None else exact
        layer, head, i = np.nonzero(src >= 0)
        from_, to = src[layer, head, i], dst[layer, head, i]
        k, v = (self._with_exact(which, table, slots, exact) for which in (0, 1))
        incoming = v[layer, from_, head]
        rounds = (exact[from_ // BLOCK] >= 0) & (exact[to // BLOCK] < 0)
        incoming[rounds] = rounded_values(incoming[rounds])
        k[layer, to, head], v[layer, to, head] = k[layer, from_, head], incoming
        moved = torch.zeros(*k.shape[:3], dtype=torch.bool)
        moved[layer, to, head] = True
        left = slots - src.shape[2]
        for b in range(-(-left // BLOCK)):
            there = slice(b * BLOCK, (b + 1) * BLOCK)
            if exact[b] < 0:
                self._replace(int(table[b]), k[:, there], v[:, there], moved[:, there])
                continue
            there = slice(b * BLOCK, min(left, (b + 1) * BLOCK))
            at = int(exact[b]) * BLOCK
            for which, x in enumerate((k, v)):
                x[:, there] = self.tail.stored(x[:, there])
                self.tail.kv[which][:, at : at + there.stop - there.start] = x[:, there]
            if there.stop - there.start == BLOCK:
                for own in range(len(k)):
                    heads = moved[own, there].any(0)
                    self.pack(own, int(table[b]), k[own, there], v[own, there], heads)

    def _replace(self, block: int, k: torch.Tensor, v: torch.Tensor, moved: torch.Tensor) -> None:
        """k, v: [layers, BLOCK, kv_heads, head_dim], of which those that moved (no dim) are new."""
        old, stays = self._grid(block), ~moved[..., None]
        at = old.at(k)
        fits = (((at >= -0.5) & (at <= LARGEST + 0.5)) | stays).all(1, keepdim=True)
        new, enough = KeyGrid.within(k, old.units)
        enough = (enough | fits).all(-1, keepdim=True)  # of a head; else all of its channels begin anew
        new = KeyGrid(*(torch.where(enough, a, b) for a, b in zip(new, KeyGrid.over(k), strict=True)))
        fits &= enough
        grid = KeyGrid(
            torch.where(fits, old.scale, new.scale), torch.where(fits, old.offset, new.offset), new.units
        )
        self.kv[0][:, self._slots(block)] = torch.where(fits & stays, k, grid.rounded(k))
        self.kv[1][:, self._slots(block)] = v
        self._keep_grid(self.grids[:, block], grid)

    def value_spread(self, table: np.ndarray, weights: np.ndarray, exact: Exact = None) -> np.ndarray:
        values = self._with_exact(1, table, weights.shape[2], exact).transpose(1, 2)
        return spread(values, weights)

    def turn_keys(
        self, table: np.ndarray, delta: np.ndarray, ropes: list[RopeConfig | None], exact: Exact = None
    ) -> None:
        """A block of which a key turns gets new ranges."""
        n = delta.shape[2]
        found = self._with_exact(0, table, n, exact)
        for layer, rope in enumerate(ropes):
            if rope is None:
                continue
            angle = torch.from_numpy(delta[layer]).double().T[..., None] * torch.from_numpy(
                rope.frequencies()
            )
            keys = rotate(found[layer], angle.cos().float(), angle.sin().float())
            for b in range(-(-n // BLOCK)):
                k = keys[b * BLOCK : (b + 1) * BLOCK]
                if exact is not None and exact[b] >= 0:
                    k = self.tail.stored(k)
                    self.tail.kv[0, layer, exact[b] * BLOCK : exact[b] * BLOCK + len(k)] = k
                if len(k) == BLOCK:
                    turned = torch.from_numpy(delta[layer][:, b * BLOCK : (b + 1) * BLOCK].any(1))
                    self.pack_keys(layer, int(table[b]), k, turned)
