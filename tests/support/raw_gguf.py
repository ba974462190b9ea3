"""A GGUF taken apart, so that a test can put it together again with something wrong in it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.formats.gguf_file import GGUFFile

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Raw:
    """A GGUF taken apart: fields as (key, type, value), tensors as [name, dimensions, kind, offset], data."""

    def __init__(self, path: Path):
        file = GGUFFile(path)
        self.fields = [(key, *typed(value)) for key, value in file.fields.items()]
        self.tensors = []
        self.data = b""
        for t in file.tensors.values():
            self.data += b"\0" * (-len(self.data) % 32)
            self.tensors.append([t.name, list(t.shape[::-1]), t.kind, len(self.data)])
            self.data += bytes(file.map[t.start : t.start + t.n_bytes])
        self.version, self.lies = 3, {}

    def write(self, path: Path) -> Path:
        """Put it together again; `lies` are what is said in place of counts and sizes."""
        out = b"GGUF" + struct.pack("<I", self.version)
        out += struct.pack("<QQ", *(self.lies.get(n, len(x)) for n, x in self._counted()))
        for key, kind, value in self.fields:
            out += self.string(key) + struct.pack("<I", kind) + self.value(kind, value)
        for name, dims, kind, offset in self.tensors:
            out += self.string(name) + struct.pack("<I", len(dims))
            out += b"".join(struct.pack("<Q", d % (1 << 64)) for d in dims)
            out += struct.pack("<IQ", kind, offset % (1 << 64))
        out += b"\0" * (-len(out) % 32)
        path.write_bytes(out + self.data)
        return path

    def _counted(self):
        return ("tensors", self.tensors), ("fields", self.fields)

    def string(self, text: str | bytes) -> bytes:
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", self.lies.get(text, len(raw))) + raw

    def value(self, kind: int, value: Any) -> bytes:
        if kind == STRING:
            return self.string(value)
        if kind != ARRAY:
            return struct.pack("<" + SCALARS[kind], value) if kind in SCALARS else b"\0" * 8
        item, items = value
        body = b"".join(self.value(item, v) for v in items)
        return struct.pack("<IQ", item, self.lies.get("items", len(items))) + body


def typed(value: Any) -> tuple[int, Any]:
    """GGUF's type of a value, and the value."""
    if isinstance(value, bool):
        return 7, value
    if isinstance(value, int):
        return (11, value) if value < 0 else (10, value)
    if isinstance(value, float):
        return 12, value
    if isinstance(value, str):
        return STRING, value
    if isinstance(value, np.ndarray):
        return ARRAY, (12, value.tolist()) if value.dtype.kind == "f" else (11, value.tolist())
    return ARRAY, (STRING, list(value))
