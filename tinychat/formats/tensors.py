"""The tensors of a folder: safetensors, or one llm-awq `.pt`; views of mapped files, read when asked for."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.extras import import_torch
from tinychat.base.files import MAX_SETTINGS, MappedFile, open_mapped, read_text
from tinychat.network.weights import bf16_to_f32

DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U32": "<u4",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
}  # BF16 and F8: their bits
FLOATS = ("F32", "F16", "BF16")
MAX_HEADER = 32 << 20  # bytes of a safetensors header or an index; the largest known have ten million
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LLM_AWQ = re.compile(r"-w4-g(-?\d{1,6})-awq(-v2)?\.pt$")  # how llm-awq names what it writes
PULL_AGAIN = "The folder is damaged or incomplete; pull or convert it again."


@dataclass(frozen=True)
class Tensor:
    """One tensor: its dtype in safetensors' spelling, its shape, and how to have it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def kind(self) -> str:
        """What `numbers` gives, in the words of `weight_form`."""
        return "fp16" if self.dtype == "F16" else "fp32"

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(DTYPES.get(self.dtype, "u1")).itemsize

    def numbers(self) -> np.ndarray:
        """A float tensor in the smallest of float16 and float32 that holds it."""
        a = self.read()
        return bf16_to_f32(a) if self.dtype == "BF16" else a if self.dtype == "F16" else a.astype(np.float32)


class Tensors:
    """All tensors of a folder by name. `files` are those that hold them; `index` says which holds which."""

    def __init__(
        self,
        folder: Path,
        named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda t: t,
        wanted: str | None = None,
    ):
        """Read headers only; `named` gives the tensors the names that they are asked for by.

        wanted  the file, or the index of shards, that the folder's settings name
        Raises CheckpointError for damage, UnsupportedModelError for pickles.
        """
        self.folder = folder
        self.files: list[MappedFile] = []
        self.index: dict[str, str] = {}
        self._modules: dict[str, dict[str, Tensor]] = {}
        self._tensors = named(self._open(wanted))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        t = self._tensors.get(name)
        if t is None:
            raise CheckpointError(f"{self.folder.name} has no tensor {name}.", PULL_AGAIN)
        return t

    def rename(self, module: str, to: str) -> None:
        """Give a module's tensors another module's names."""
        self._modules.clear()
        for name in [n for n in self._tensors if n.startswith(f"{module}.")]:
            self._tensors[to + name.removeprefix(module)] = self._tensors.pop(name)

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] | None = FLOATS) -> None:
        """Refuse a tensor that is missing, or of another shape or (where they are given) dtype."""
        t = self[name]
        if t.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {list(t.shape)}; config.json says {list(shape)}.",
                "The weights and config.json do not belong together; pull or convert the model again.",
            )
        if dtypes is not None and t.dtype not in dtypes:
            raise UnsupportedModelError(
                f"{name} is stored as {t.dtype}, which is not supported there.",
                f"Supported: {', '.join(dtypes)}.",
            )

    def parts(self, module: str) -> dict[str, Tensor]:
        """All tensors of a module by what follows its name."""
        if not self._modules:
            for name, t in self._tensors.items():
                owner, _, part = name.rpartition(".")
                self._modules.setdefault(owner, {})[part] = t
        return self._modules.get(module, {})

    def n_bytes(self, module: str) -> int:
        """Bytes of all tensors of a module but its bias."""
        return sum(t.n_bytes for part, t in self.parts(module).items() if part != "bias")

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file; bfloat16 as its bits."""
        return self[name].read()

    def float32(self, name: str) -> np.ndarray:
        """A float tensor in float32."""
        a = self.array(name)
        return bf16_to_f32(a) if self[name].dtype == "BF16" else a.astype(np.float32)

    def _open(self, wanted: str | None) -> dict[str, Tensor]:
        """Open the files that transformers would: the one that is named, else one whole file, else the shards
        of an index; else the only file there is.
        """
        folder = self.folder
        for name in filter(None, (wanted, "model.safetensors")):
            if name.endswith(".safetensors") and is_there(folder / name):
                return self._safetensors(folder / name)
            index = read_json(folder / f"{name.removesuffix('.index.json')}.index.json", MAX_HEADER)
            if index is not None:
                return self._shards(index)
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return self._safetensors(files[0])
        if files:
            raise CheckpointError(
                f"{folder.name} has {len(files)} safetensors files and no model.safetensors.index.json.",
                PULL_AGAIN,
            )
        saved = llm_awq_file(folder)
        if saved is not None:
            return self._torch(saved)
        if any(next(folder.glob(p), None) for p in PICKLES):
            raise UnsupportedModelError(
                f"{folder.name} holds its weights as pickle files, which can run code when they are read.",
                "Convert them to safetensors, or choose a repository that has them.",
            )
        raise CheckpointError(f"{folder.name} holds no *.safetensors.", PULL_AGAIN)

    def _shards(self, index: dict[str, Any]) -> dict[str, Tensor]:
        """All tensors of the files that the index names, of one name the last, as transformers reads them."""
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("model.safetensors.index.json has no weight_map.", PULL_AGAIN)
        for file in weight_map.values():
            plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
            if not plain or "\\" in file:
                raise CheckpointError(
                    f"model.safetensors.index.json names {file!r}, which is not a plain file name.",
                    "The folder may be hostile; pull it from a source that you trust.",
                )
        tensors: dict[str, Tensor] = {}
        for file in sorted({str(f) for f in weight_map.values()}):
            if not (self.folder / file).exists():
                raise CheckpointError(f"The shard {file} is missing.", PULL_AGAIN)
            held = self._safetensors(self.folder / file)
            tensors |= held
            self.index |= dict.fromkeys(held, file)
        return tensors

    def _safetensors(self, path: Path) -> dict[str, Tensor]:
        """One file. The safetensors library checks header, sizes and offsets first."""
        file = open_mapped(path)
        try:
            (length,) = struct.unpack("<Q", file.read(0, 8))
            if length > min(file.size, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes")
            with safe_open(file.same_again, framework="numpy"):
                pass
            header = json.loads(file.read(8, length))
        except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as e:
            raise CheckpointError(f"{path.name} is not a sound safetensors file: {e}.", PULL_AGAIN) from e
        header.pop("__metadata__", None)
        self.files.append(file)

        def tensor(t: dict[str, Any]) -> Tensor:
            dtype, shape, at = t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0]
            return Tensor(dtype, shape, lambda: _view(file, dtype, shape, at))

        return {name: tensor(t) for name, t in header.items()}

    def _torch(self, file: Path) -> dict[str, Tensor]:
        """A state dict that torch saved, unpickled as tensors only: what could run code is refused."""
        torch = import_torch(f"Reading {file.name}")
        mapped = open_mapped(file)
        names = {
            torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
        }  # fmt: skip
        try:
            state = torch.load(mapped.same_again, map_location="cpu", mmap=True, weights_only=True)
            items = dict(state).items()
        except Exception as e:  # pickle, zip, torch: each has its own
            raise CheckpointError(
                f"{file.name} cannot be read as plain tensors: {str(e).splitlines()[0][:160]}.",
                "It is damaged, or holds more than tensors; convert it to safetensors.",
            ) from e
        size, tensors = mapped.size, {}
        for name, t in items:
            if not isinstance(t, torch.Tensor) or t.dtype not in names:
                raise UnsupportedModelError(
                    f"{name} in {file.name} is no tensor of a kind that is read.",
                    f"Supported: {', '.join(DTYPES)}.",
                )
            if not t.is_contiguous() or t.numel() * t.element_size() > size:
                raise CheckpointError(f"{name} in {file.name} is larger than the file.", PULL_AGAIN)
            tensors[name] = Tensor(names[t.dtype], tuple(t.shape), _reader(mapped, t.detach()))
        self.files.append(mapped)
        return tensors


def _view(file: MappedFile, stored: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    file.check()
    dtype, count = np.dtype(DTYPES[stored]), int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    raw = np.frombuffer(file.data, np.uint8, count * dtype.itemsize, offset)
    if offset % dtype.itemsize:
        raw = raw.copy()  # the format does not promise alignment
    return raw.view(dtype).reshape(shape)


def _reader(file: MappedFile, t: Any) -> Callable[[], np.ndarray]:
    import torch

    def read() -> np.ndarray:
        file.check()
        return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()

    return read


def llm_awq_file(folder: Path) -> Path | None:
    """The one file that llm-awq wrote there, or None."""
    found = [f for f in sorted(folder.glob("*.pt")) if LLM_AWQ.search(f.name)]
    return found[0] if len(found) == 1 else None


def is_there(path: Path) -> bool:
    """Whether there is anything of that name. What is no regular file is refused when it is read, by name."""
    return os.path.lexists(path)


def read_json(path: Path, limit: int = MAX_SETTINGS) -> dict[str, Any] | None:
    """A JSON object of at most `limit` bytes, or None when the file does not exist."""
    if not is_there(path):
        return None
    try:
        value = json.loads(read_text(path, limit))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except OSError as e:
        raise CheckpointError(f"{path.name} cannot be read: {e.strerror or e}.", PULL_AGAIN) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path.name} cannot be read: {e}.", PULL_AGAIN) from e
    return value
