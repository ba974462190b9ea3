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

# What `BESIDE` of layout.cuh knows. Bytes of a record, of outputs g and g + 8 of a group:
RECORD = {"NONE": 0, "FP16": 4, "ZERO": 4, "FP16_FP16": 8, "FP32": 8, "FP32_FP32": 16}
# and of coded ones: bits of a code, numbers of a group (scale, offset), bytes of what they are multiplied by,
# and what is added to a code so that it is no longer negative.
CODED = {
    "INT4_INT4": (4, 2, 8, 0),
    "INT6": (6, 1, 4, 32),
    "INT6_INT6": (6, 2, 8, 0),
    "INT8": (8, 1, 4, 128),
    "E8M0": (8, 1, 0, 0),
    "E4M3": (8, 1, 8, 0),
}
# And of `DECODING`, beside the numbers: bits of a code.
TABLES = {"IQ4_NL": 4, "E2M1": 4, "E4M3": 8, "NF4": 4}
BLOCK = 256  # inputs of a block of coded scales


@dataclass(frozen=True)
class Form:
    """Kernel that a weight is for: words of layout.cuh.

    bits      of a code; 16 or 32 as they are
    decoding  "UNSIGNED", "SIGNED" or one of TABLES
    beside    one of RECORD or CODED
    group     16; else 32 of coded ones; else 0
    """

    bits: int
    decoding: str = "UNSIGNED"
    beside: str = "NONE"
    group: int = 0

    @property
    def defines(self) -> dict[str, str]:
        """Definitions that embed.cu is compiled with."""
        words = {"BITS": self.bits, "DECODING": self.decoding, "BESIDE": self.beside, "GROUP": self.group}
        return {name: str(word) for name, word in words.items()}

    @property
    def stage(self) -> int:
        """Inputs of a stage."""
        return CHUNK if self.bits >= 8 or self.decoding == "NF4" else 2 * CHUNK

    @property
    def planes(self) -> tuple[int, int]:
        """Bits of a code in each plane."""
        if self.bits < 4:
            return 2, self.bits - 2
        return (4, self.bits - 4) if self.bits < 8 else (self.bits, 0)

    @property
    def stage_bytes(self) -> int:
        """Bytes of a tile's stage."""
        return TILE * self.stage * self.bits // 8

    @property
    def deep(self) -> bool:
        """Whether two tiles a warp leave room for enough stages under way."""
        return self.bits not in (5, 6, 32)


@dataclass(frozen=True)
class Shape:
    """Sizes of a packed weight. groups: scales an output; group: inputs that share one."""

    form: Form
    n: int
    k: int
    group: int

    @property
    def defines(self) -> dict[str, str]:
        """Definitions that linear.cu and experts.cu are compiled with. SPLIT: a stage's chunks are in groups
        of their own.
        """
        plain = self.form.beside != "NONE" and self.form.group == 0
        split = plain and self.form.stage > CHUNK and self.groups > 1 and self.group % self.form.stage != 0
        return {**self.form.defines, **({"SPLIT": "1"} if split else {})}

    @property
    def tiles(self) -> int:
        """Number of tiles, of 16 outputs each."""
        return -(-self.n // TILE)

    @property
    def stages(self) -> int:
        """Number of stages in which a tile's inputs are read."""
        return -(-self.k // self.form.stage)

    @property
    def groups(self) -> int:
        """Records of a row."""
        return self.k // self.group if self.form.beside != "NONE" else 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes, meta and zeros."""
        codes = self.tiles * self.stages * self.form.stage_bytes
        if self.form.beside in CODED:
            return codes, self.tiles * self._coded, 0
        meta = self.tiles * self.groups * 8 * RECORD[self.form.beside]
        return codes, meta, self.tiles * self.groups * 8 if self.form.beside == "ZERO" else 0

    @property
    def _coded(self) -> int:
        """Bytes of a tile's coded scales and offsets."""
        bits, kinds, times, _ = CODED[self.form.beside]
        blocks = -(-self.stages * self.form.stage // BLOCK)
        block = BLOCK // self.form.group * kinds * 2 * bits  # of eight g, in bytes
        row = times * 8
        return blocks * block + row if self.form.beside == "E4M3" else blocks * (block + row)


def bands(n: int) -> Iterator[tuple[int, int]]:
    """Whole tiles of rows, one behind the other."""
    for begin in range(0, n, BAND):
        yield begin, min(begin + BAND, n)


def pack_codes(codes: np.ndarray, form: Form) -> np.ndarray:
    """uint8 codes 0…2^bits - 1 [n, k], or int8 numbers, to uint8 [tiles, stages, …]."""
    a = _padded(codes, form.stage)
    tiles, stages = a.shape[0] // TILE, a.shape[1] // form.stage
    # tile, which row of eight, g, stage, chunk, t, eight inputs
    if form.group == 16:
        a = a.reshape(tiles, 2, 8, stages, -1, 2, 4, 4).swapaxes(5, 6)
    a = a.reshape(tiles, 2, 8, stages, -1, 4, 8)
    if form.bits == 8:
        a = a.view(np.uint8) ^ np.uint8(0x80) if form.decoding == "SIGNED" else a
        return np.ascontiguousarray(a.transpose(0, 3, 2, 5, 4, 1, 6)).reshape(tiles, stages, -1)
    low, high = form.planes
    table = form.decoding in TABLES
    planes = [_plane(a & np.uint8((1 << low) - 1) if high else a, low, table)]
    if high:
        planes.append(_plane(a >> np.uint8(low), high))
    return np.concatenate([p.reshape(tiles, stages, -1) for p in planes], axis=2)


def _plane(a: np.ndarray, bits: int, in_order: bool = False) -> np.ndarray:
    """Some bits of codes [tile, which row of eight, g, stage, chunk, t, eight inputs], as lanes read them."""
    if bits == 4:
        # Byte i of a word: nibbles 2i and 2i + 1. Nibble j is input 2j, nibble j + 4 is input 2j + 1.
        low, high = (a[..., 0::2], a[..., 1::2]) if in_order else (a[..., [0, 4, 1, 5]], a[..., [2, 6, 3, 7]])
        return np.ascontiguousarray((low | high << 4).transpose(0, 3, 2, 5, 4, 1, 6))
    # Eight bytes at once: pairs of inputs move down to the first pair, each to bits of its own.
    eight, step = np.ascontiguousarray(a).view("<u8"), np.uint64(16 - bits)
    four = eight | eight >> step
    a = (four | four >> (step + step)).astype("<u2").view(np.uint8)  # …, even inputs or odd ones
    if bits == 2:
        return np.ascontiguousarray(a.transpose(0, 3, 2, 5, 4, 6, 1))
    return np.ascontiguousarray((a[:, 0] | a[:, 1] << np.uint8(4)).transpose(0, 2, 1, 4, 5, 3))


def pack_coded(shape: Shape, codes: list[np.ndarray], times: list[np.ndarray]) -> np.ndarray:
    """Integers [n, groups] of scales (and offsets), and floats [n or 1, k/256 or 1] that they are multiplied
    by, to uint8 [tiles, …].
    """
    form, tiles = shape.form, shape.tiles
    bits, _, _, shift = CODED[form.beside]
    blocks = -(-shape.stages * form.stage // BLOCK)
    columns = blocks * (BLOCK // form.group)
    parts = []
    for a in codes:
        a = np.repeat((a.astype(np.int16) + shift).astype(np.uint8), shape.group // form.group, axis=1)
        a = np.pad(a, [(0, -len(a) % TILE), (0, columns - a.shape[1])])
        parts.append(a.reshape(tiles, 2, 8, blocks, -1))
    # tile, block, g; group, scale or offset, which row of eight
    fields = np.stack(parts, axis=1).transpose(0, 4, 3, 5, 1, 2).reshape(tiles, blocks, 8, -1)
    stage = fields.shape[3] * form.stage // BLOCK
    planes = [_units(fields & 15, 4, 4 * stage), _units(fields >> 4, 2, 2 * stage)] if bits == 6 else []
    planes = planes or [_units(fields, bits, bits * stage)]
    head = []
    if times:
        records = pack_meta(*(np.broadcast_to(a, (shape.n, a.shape[1])) for a in times))
        if form.beside == "E4M3":
            head = [records.reshape(tiles, -1)]
        else:
            planes.insert(0, records)
    return np.concatenate([*head, np.concatenate(planes, axis=2).reshape(tiles, -1)], axis=1)


def _units(fields: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Fields [tiles, blocks, 8, n] of so many bits, `run` bits a stage, to bytes [tiles, blocks, …]: units of
    4 bytes, or of a stage's 8, of all eight g.
    """
    tiles, blocks, _, n = fields.shape
    a = fields.reshape(tiles, blocks, 8, n * bits // 8, -1) << (np.arange(8 // bits, dtype=np.uint8) * bits)
    a = np.bitwise_or.reduce(a, axis=4).reshape(tiles, blocks, 8, -1, 8 if run > 32 else 4)
    return np.ascontiguousarray(a.transpose(0, 1, 3, 2, 4)).reshape(tiles, blocks, -1)


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
