"""Machine code as NVRTC makes it: an ELF file with a section of 16-byte instructions for each kernel."""

from __future__ import annotations

import struct

COPY_ASYNC = 0xDAE  # LDGSTS, with a uniform register
BRANCH = 0x947
MULTIPLY = 0x3C  # HMMA, without how its operands are given
OPCODE = 0xFFF


def kernels(image: bytes) -> dict[str, list[tuple[int, int]]]:
    """Instructions of each kernel, as two words of 64 bits."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<3H", image, 58)
    headers = [struct.unpack_from("<2I4Q", image, table + size * i) for i in range(count)]
    found = {}
    for name, _, _, _, begin, length in headers:
        start = headers[names][4] + name
        title = image[start : image.index(b"\0", start)].decode()
        if title.startswith(".text."):
            code = image[begin : begin + length]
            found[title.removeprefix(".text.")] = list(struct.iter_unpack("<2Q", code))
    return found


def lost_policies(image: bytes) -> int:
    """Copies in a module for sm_90 that take their policy from a uniform register that nobody has written: in
    those, and in no sound one, its number is 0 (Triton #11660).
    """
    return sum(
        low & OPCODE == COPY_ASYNC and high & 0x3F == 0
        for code in kernels(image).values()
        for low, high in code
    )


def stage(code: list[tuple[int, int]], architecture: int) -> int:
    """Instructions of a kernel's shortest loop that copies in the background and multiplies, or 0."""
    found = []
    for i, (low, high) in enumerate(code):
        begin = i + 1 + _offset(low, high, architecture) if low & OPCODE == BRANCH else i + 1
        if {MULTIPLY, COPY_ASYNC & 0xFF} <= {word & 0xFF for word, _ in code[begin:i]}:
            found.append(i + 1 - begin)
    return min(found, default=0)


def _offset(low: int, high: int, architecture: int) -> int:
    """Where a branch goes, in instructions from the next one on."""
    bits = high << 64 | low
    if architecture < 90:
        distance, width = bits >> 32 & (1 << 50) - 1, 50
    else:
        distance, width = (bits >> 34 & (1 << 48) - 1) << 10 | (bits >> 16 & 0xFF) << 2, 58
    return (distance - (1 << width) * (distance >> (width - 1))) // 16
