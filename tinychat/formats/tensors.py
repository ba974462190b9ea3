"""The tensors of a folder: safetensors, or one llm-awq `.pt`; views of mapped files, read when asked for."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tinychat.errors import CheckpointError, UnsupportedModelError
from tinychat.extras import import_torch
from tinychat.weights import bf16_to_f32

DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}  # BF16: its bits
FLOATS = ("F32", "F16", "BF16")
MAX_JSON = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LLM_AWQ = re.compile(r"-w4-g(-?\d{1,6})-awq(-v2)?\.pt$")  # how llm-awq names what it writes
PULL_AGAIN = "The folder is damaged or incomplete; pull or convert it again."


@dataclass(frozen=True)
class Tensor:
    """One tensor: its dtype in safetensors' spelling, its shape, and how to have it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Tensors:
    """All tensors of a folder by name. `files` are those that hold them."""

    def __init__(self, folder: Path, named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda t: t):
        """Read headers only; `named` gives the tensors the names that they are asked for by.

        Raises CheckpointError for damage, UnsupportedModelError for pickles.
        """
        self.folder = folder
        self.files: set[Path] = set()
        self._maps: dict[Path, np.memmap] = {}
        self._tensors = named(self._open())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        t = self._tensors.get(name)
        if t is None:
            raise CheckpointError(f"{self.folder.name} has no tensor {name}.", PULL_AGAIN)
        return t

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
        """Refuse a tensor that is missing, or of another shape or dtype."""
        t = self[name]
        if t.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {list(t.shape)}; config.json says {list(shape)}.",
                "The weights and config.json do not belong together; pull or convert the model again.",
            )
        if t.dtype not in dtypes:
            raise UnsupportedModelError(
                f"{name} is stored as {t.dtype}, which is not supported there.",
                f"Supported: {', '.join(dtypes)}.",
            )

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file; bfloat16 as its bits."""
        return self[name].read()

    def float32(self, name: str) -> np.ndarray:
        """A float tensor in float32."""
        a = self.array(name)
        return bf16_to_f32(a) if self[name].dtype == "BF16" else a.astype(np.float32)

    def scales(self, name: str) -> np.ndarray:
        """A float tensor in the smallest of float16 and float32 that holds it."""
        return self.array(name) if self[name].dtype == "F16" else self.float32(name)

    def _open(self) -> dict[str, Tensor]:
        folder = self.folder
        index = read_json(folder / "model.safetensors.index.json")
        if index is not None:
            return self._shards(index)
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
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
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("model.safetensors.index.json has no weight_map.", PULL_AGAIN)
        tensors: dict[str, Tensor] = {}
        shards: dict[str, dict[str, Tensor]] = {}
        for tensor, file in weight_map.items():
            plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
            if not plain or "\\" in file:
                raise CheckpointError(
                    f"model.safetensors.index.json names {file!r}, which is not a plain file name.",
                    "The folder may be hostile; pull it from a source that you trust.",
                )
            if file not in shards:
                if not (self.folder / file).is_file():
                    raise CheckpointError(f"The shard {file} is missing.", PULL_AGAIN)
                shards[file] = self._safetensors(self.folder / file)
            if tensor not in shards[file]:
                raise CheckpointError(
                    f"The shard {file} does not hold {tensor}, as the index says.", PULL_AGAIN
                )
            tensors[tensor] = shards[file][tensor]
        return tensors

    def _safetensors(self, file: Path) -> dict[str, Tensor]:
        """One file. The safetensors library checks header, sizes and offsets first."""
        try:
            with safe_open(file, framework="numpy"):
                pass
            with file.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length))
        except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as e:
            raise CheckpointError(f"{file.name} is not a sound safetensors file: {e}.", PULL_AGAIN) from e
        header.pop("__metadata__", None)
        self.files.add(file)

        def tensor(t: dict[str, Any]) -> Tensor:
            dtype, shape, at = t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0]
            return Tensor(dtype, shape, lambda: self._view(file, dtype, shape, at))

        return {name: tensor(t) for name, t in header.items()}

    def _view(self, file: Path, stored: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
        if file not in self._maps:
            self._maps[file] = np.memmap(file, np.uint8, mode="r")
        dtype = np.dtype(DTYPES[stored])
        end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        raw = np.asarray(self._maps[file])[offset:end]
        if offset % dtype.itemsize:
            raw = raw.copy()  # the format does not promise alignment
        return raw.view(dtype).reshape(shape)

    def _torch(self, file: Path) -> dict[str, Tensor]:
        """A state dict that torch saved, unpickled as tensors only: what could run code is refused."""
        torch = import_torch(f"Reading {file.name}")
        names = {
            torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
        }  # fmt: skip
        try:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            items = dict(state).items()
        except Exception as e:  # pickle, zip, torch: each has its own
            raise CheckpointError(
                f"{file.name} cannot be read as plain tensors: {str(e).splitlines()[0][:160]}.",
                "It is damaged, or holds more than tensors; convert it to safetensors.",
            ) from e
        size, tensors = file.stat().st_size, {}
        for name, t in items:
            if not isinstance(t, torch.Tensor) or t.dtype not in names:
                raise UnsupportedModelError(
                    f"{name} in {file.name} is no tensor of a kind that is read.",
                    f"Supported: {', '.join(DTYPES)}.",
                )
            if not t.is_contiguous() or t.numel() * t.element_size() > size:
                raise CheckpointError(f"{name} in {file.name} is larger than the file.", PULL_AGAIN)
            tensors[name] = Tensor(names[t.dtype], tuple(t.shape), _reader(t.detach()))
        self.files.add(file)
        return tensors


def _reader(t: Any) -> Callable[[], np.ndarray]:
    import torch

    if t.dtype == torch.bfloat16:
        return lambda: t.view(torch.int16).numpy().view(np.uint16)
    return t.numpy


def llm_awq_file(folder: Path) -> Path | None:
    """The one file that llm-awq wrote there, or None."""
    found = [f for f in sorted(folder.glob("*.pt")) if LLM_AWQ.search(f.name)]
    return found[0] if len(found) == 1 else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file does not exist."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path.name} cannot be read: {e}.", PULL_AGAIN) from e
    return value
