"""Weights as the kernels read them: `src/layout.cuh` says where every bit goes, this writes it.

A weight is packed in the smallest form that holds it exactly, a band of rows at a time. Nothing here knows
where weights come from; arrays are as in `tinychat.network.weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TILE = 16  # outputs
CHUNK = 32  # inputs that a lane has eight of
BAND = 1024  # outputs packed at once: bounds what is copied
OFF_BY = np.float32(2048)
LARGEST_HALF = 65504.0

VECTORS = {4: 1, 8: 1, 16: 2, 32: 4}
STAGE = {4: 64, 8: 32, 16: 32, 32: 32}
RECORD = {"SYMMETRIC": 4, "ZERO": 4, "OFFSET": 8, "FLOAT": 16, "NONE": 0}


@dataclass(frozen=True)
class Form:
    """Kernel that a weight is for: 4 or 8 bits with a META of layout.cuh, or 16 or 32 bits as they are."""

    bits: int
    meta: str = "NONE"

    @property
    def defines(self) -> dict[str, str]:
        """Definitions that linear.cu and embed.cu are compiled with."""
        return {"BITS": str(self.bits), "META": self.meta}


FORMS = (
    Form(4, "SYMMETRIC"),
    Form(4, "ZERO"),
    Form(4, "OFFSET"),
    Form(4, "FLOAT"),
    Form(8, "SYMMETRIC"),
    Form(8, "FLOAT"),
    Form(16),
    Form(32),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a packed weight. groups: scales an output; group: inputs that share one."""

    form: Form
    n: int
    k: int
    group: int

    @property
    def tiles(self) -> int:
        """Number of tiles, of 16 outputs each."""
        return -(-self.n // TILE)

    @property
    def stages(self) -> int:
        """Number of stages in which a tile's inputs are read."""
        return -(-self.k // STAGE[self.form.bits])

    @property
    def groups(self) -> int:
        """Records of a row."""
        return self.k // self.group if self.form.meta != "NONE" else 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes, meta and zeros."""
        codes = self.tiles * self.stages * VECTORS[self.form.bits] * 512
        meta = self.tiles * self.groups * 8 * RECORD[self.form.meta]
        return codes, meta, self.tiles * self.groups * 8 if self.form.meta == "ZERO" else 0


def bands(n: int) -> Iterator[tuple[int, int]]:
    """Whole tiles of rows, one behind the other."""
    for begin in range(0, n, BAND):
        yield begin, min(begin + BAND, n)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes 0…15 [n, k] (4 bits) or int8 codes [n, k] (8 bits) to uint8 [tiles, stages, 512]."""
    a = _padded(codes.astype(np.uint8) if bits == 4 else codes, STAGE[bits])
    tiles, stages = a.shape[0] // TILE, a.shape[1] // STAGE[bits]
    # tile, which row of eight, g, stage, chunk, t, eight inputs
    a = a.reshape(tiles, 2, 8, stages, -1, 4, 8)
    if bits == 8:
        a = a.view(np.uint8) ^ np.uint8(0x80)
        return np.ascontiguousarray(a.transpose(0, 3, 2, 5, 4, 1, 6)).reshape(tiles, stages, 512)
    # Byte i of a word: nibbles 2i and 2i + 1. Nibble j is input 2j, nibble j + 4 is input 2j + 1.
    low, high = a[..., [0, 4, 1, 5]], a[..., [2, 6, 3, 7]]
    words = np.ascontiguousarray((low | high << 4).transpose(0, 3, 2, 5, 4, 1, 6))
    return words.reshape(tiles, stages, 512)


def pack_halves(parts: list[np.ndarray]) -> np.ndarray:
    """uint16 [n, k] arrays (one, or a second: what the first is off by) to uint8 [tiles, stages, …]."""
    packed = []
    for part in parts:
        a = _padded(part, CHUNK)
        a = a.reshape(
            a.shape[0] // TILE, 2, 8, -1, 4, 8
        )  # tile, which row of eight, g, stage, t, eight inputs
        packed.append(a.transpose(0, 3, 1, 2, 4, 5))
    a = np.ascontiguousarray(np.stack(packed, axis=2))
    return a.reshape(a.shape[0], a.shape[1], -1).view(np.uint8)


def pack_meta(scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """float16 or float32 [n, groups] (and offsets of that kind) to records, uint8 [tiles, groups, …]."""
    parts = [_padded(a, 1) for a in (scales, offsets) if a is not None]
    a = np.stack(
        [p.reshape(p.shape[0] // TILE, 2, 8, -1) for p in parts], axis=1
    )  # tile, part, half, g, group
    a = np.ascontiguousarray(a.transpose(0, 4, 3, 1, 2))
    return a.reshape(a.shape[0], a.shape[1], -1).view(np.uint8)


def pack_zeros(zeros: np.ndarray) -> np.ndarray:
    """uint8 0…15 [n, groups] to uint8 [tiles, groups, 8]."""
    a = _padded(zeros, 1)
    a = a.reshape(a.shape[0] // TILE, 2, 8, -1)
    return np.ascontiguousarray((a[:, 0] | a[:, 1] << 4).transpose(0, 2, 1))


def split_floats(w: np.ndarray) -> list[np.ndarray]:
    """float32 to the bits of a half and of the half that it is off by, times 2048: 21 bits or more."""
    near = np.clip(w, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    rest = np.clip((w - near.astype(np.float32)) * OFF_BY, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    return [near.view(np.uint16), rest.view(np.uint16)]


def _padded(a: np.ndarray, columns: int) -> np.ndarray:
    n, k = a.shape
    more = -n % TILE, -k % columns
    return np.pad(a, [(0, more[0]), (0, more[1])]) if any(more) else a
