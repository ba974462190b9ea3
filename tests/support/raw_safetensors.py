"""Safetensors files with dtypes that numpy does not have, by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

USUAL = {
    "float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32",
    "int64": "I64", "uint32": "U32", "uint16": "BF16", "float64": "F64",
}  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> None:
    """dtypes: safetensors' words for bytes that are no integers."""
    header, at = {}, 0
    for name, a in tensors.items():
        word = USUAL[str(a.dtype)]
        if a.dtype == np.uint8:
            word = (dtypes or {}).get(name, word)
        header[name] = {"dtype": word, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a sound file (as bits where numpy lacks the type), and safetensors' words for dtypes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    kinds = {word: name for name, word in USUAL.items()}
    tensors = {}
    for name, t in header.items():
        a, b = t["data_offsets"]
        tensors[name] = np.frombuffer(data[a:b], kinds.get(t["dtype"], "u1")).reshape(t["shape"])
    return tensors, {name: t["dtype"] for name, t in header.items()}
