"""A safetensors file with dtypes that numpy does not have, by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

USUAL = {
    "float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32",
    "int64": "I64", "uint32": "U32", "uint16": "BF16",
}  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> None:
    """dtypes: safetensors' words for those that numpy's do not tell."""
    header, at = {}, 0
    for name, a in tensors.items():
        word = (dtypes or {}).get(name) or USUAL[str(a.dtype)]
        header[name] = {"dtype": word, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
