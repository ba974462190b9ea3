"""The container of GGUF (llama.cpp's format): metadata and tensors, read from a memory map.

Parsed here and not with the `gguf` package's reader, which trusts every count and size in the file: a damaged
one makes it allocate without end or fail in the middle of numpy. The package's dequantizers are used for the
types that have no exact counterpart in `tinychat.network.weights`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.files import MappedFile, open_mapped
from tinychat.network.weight_form import Form

MAGIC = b"GGUF"
# ggml type number → name, weights in a block, bytes in a block; the gguf package knows newer ones
F32, F16, BF16 = 0, 1, 30
TYPES = {
    F32: ("F32", 1, 4),
    F16: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    BF16: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
FORMS = {  # what the numbers of a tensor are; those of the i-quants of one to three bits have no words
    "F32": Form(32, "fp32"),
    "F16": Form(16, "fp16"),
    "BF16": Form(16, "bf16"),
    "Q4_0": Form(4, "signed", 32, "fp16"),
    "Q4_1": Form(4, "unsigned", 32, "fp16", "fp16"),
    "Q5_0": Form(5, "signed", 32, "fp16"),
    "Q5_1": Form(5, "unsigned", 32, "fp16", "fp16"),
    "Q8_0": Form(8, "signed", 32, "fp16"),
    "Q2_K": Form(2, "unsigned", 16, "int4", "int4"),
    "Q3_K": Form(3, "signed", 16, "int6"),
    "Q4_K": Form(4, "unsigned", 32, "int6", "int6"),
    "Q5_K": Form(5, "unsigned", 32, "int6", "int6"),
    "Q6_K": Form(6, "signed", 16, "int8"),
    "IQ4_NL": Form(4, "iq4_nl", 32, "fp16"),
    "IQ4_XS": Form(4, "iq4_nl", 32, "int6"),
    "MXFP4": Form(4, "e2m1", 32, "e8m0"),
    "NVFP4": Form(4, "e2m1", 16, "e4m3"),
    "TQ1_0": Form(2, "signed", 256, "fp16"),
    "TQ2_0": Form(2, "signed", 256, "fp16"),
    "Q1_0": Form(2, "signed", 128, "fp16"),
    "Q2_0": Form(2, "signed", 64, "fp16"),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_COUNT, _MAX_KEY, _MAX_STRING = 1 << 16, 1 << 16, 1 << 26


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` is [out, in], the reverse of GGUF's own order; `start` is an offset in the file
    `mapped`, which a tensor that is yet to be written lacks.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    n_bytes: int
    mapped: MappedFile | None = None


class GGUFFile:
    """The container: `fields` (metadata) and `tensors`, every size in it checked against the file."""

    def __init__(self, path: Path):
        self.path = path
        self.mapped = open_mapped(path)
        self.map, self.size = memoryview(self.mapped.data), self.mapped.size
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._at = 0
        try:
            self._parse()
        except struct.error:  # every fixed-size read past the end
            raise self.damaged("it ends in the middle of its header") from None

    def damaged(self, what: str) -> CheckpointError:
        """The file contradicts itself."""
        return CheckpointError(f"{self.path} is damaged: {what}.", "Download or convert it again.")

    def data(self, tensor: Tensor, dtype: Any = np.uint8) -> np.ndarray:
        """The tensor's bytes, as a flat read-only view of its file."""
        assert tensor.mapped is not None
        tensor.mapped.check()
        count = tensor.n_bytes // np.dtype(dtype).itemsize
        return np.frombuffer(tensor.mapped.data, dtype, count, tensor.start)

    def floats(self, tensor: Tensor) -> np.ndarray:
        """float32 in the tensor's shape, dequantized where it is quantized."""
        if tensor.kind == F32:
            return self.data(tensor, "<f4").reshape(tensor.shape)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        name, block, block_bytes = type_of(tensor.kind, tensor.name)
        rows = self.data(tensor).reshape(-1, tensor.shape[-1] // block * block_bytes)
        try:
            out = dequantize(rows, GGMLQuantizationType(tensor.kind))
        except NotImplementedError:
            raise UnsupportedModelError(
                f"The tensor {tensor.name!r} is stored as {name}, which is not supported.",
                "Give a GGUF in another quantization, such as Q4_0, Q4_K_M or Q8_0.",
            ) from None
        return out.astype(np.float32, copy=False).reshape(tensor.shape)

    def _parse(self) -> None:
        if self.map[:4] != MAGIC:
            raise CheckpointError(
                f"{self.path} is not a GGUF file: it begins with {bytes(self.map[:4])!r}.",
                "Give a .gguf file, or a Hugging Face folder with *.safetensors.",
            )
        self._at = 4
        version = self._scalar("I")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedModelError(f"{self.path} is a big-endian GGUF.", "Convert it to little-endian.")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self.path} is GGUF version {version}.", "Versions 2 and 3 are read; convert it again."
            )
        n_tensors, n_fields = self._scalar("Q"), self._scalar("Q")
        if n_tensors > _MAX_COUNT or n_fields > _MAX_COUNT:
            raise self.damaged(f"it claims {n_tensors} tensors and {n_fields} metadata fields")
        for _ in range(n_fields):
            key = self._string(_MAX_KEY)
            if key in self.fields:
                raise self.damaged(f"the field {key!r} appears twice")
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(n_tensors)]
        align = self.fields.get("general.alignment", 32)
        if not isinstance(align, int) or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise self.damaged(f"its alignment is {align!r}")
        base = -(-self._at // align) * align
        for name, shape, kind, offset in infos:
            self._place(name, shape, kind, base, offset, align)

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, base: int, offset: int, align: int
    ) -> None:
        if name in self.tensors:
            raise self.damaged(f"the tensor {name!r} appears twice")
        type_name, block, block_bytes = type_of(kind, name)
        if not shape or shape[-1] % block or any(not 0 < d < 1 << 40 for d in shape):
            raise self.damaged(f"the tensor {name!r} has the shape {list(shape)} in {type_name}")
        n_bytes = math.prod(shape) // block * block_bytes
        if offset % align or base + offset + n_bytes > self.size:
            raise self.damaged(
                f"the tensor {name!r} should end at byte {base + offset + n_bytes} of a file of {self.size}"
            )
        self.tensors[name] = Tensor(name, shape, kind, base + offset, n_bytes, self.mapped)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.map, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self, limit: int = _MAX_STRING) -> str:
        n = self._scalar("Q")
        if n > limit or n > self.size - self._at:
            raise self.damaged(f"it claims a string of {n} bytes at byte {self._at}")
        text = bytes(self.map[self._at : self._at + n]).decode("utf-8", "replace")
        self._at += n
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self.damaged(f"a metadata field has the unknown type {kind}")
        item, n = self._scalar("I"), self._scalar("Q")
        smallest = 8 if item == _STRING else struct.calcsize(_SCALARS.get(item, "B"))
        if (item != _STRING and item not in _SCALARS) or n * smallest > self.size - self._at:
            raise self.damaged(f"it claims a list of {n} items of type {item} at byte {self._at}")
        if item == _STRING:
            return [self._string() for _ in range(n)]
        values = np.frombuffer(self.map, "<" + _SCALARS[item].replace("?", "b"), n, self._at)
        self._at += values.nbytes
        return values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MAX_KEY)
        n_dims = self._scalar("I")
        if not 1 <= n_dims <= 4:
            raise self.damaged(f"the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")


def type_of(kind: int, tensor: str = "") -> tuple[str, int, int]:
    """(name, weights in a block, bytes in a block) of a ggml type number."""
    if kind in TYPES:
        return TYPES[kind]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        return (known.name, *GGML_QUANT_SIZES[known])
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"The tensor {tensor!r} has the unknown type {kind}.",
            "The file is damaged, or newer than the gguf package: pip install -U gguf.",
        ) from None
