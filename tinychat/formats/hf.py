"""Checkpoints in Hugging Face layout: a folder with config.json and safetensors, dense or AutoAWQ `gemm`."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tinychat.config import ModelConfig
from tinychat.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tinychat.formats import awq
from tinychat.models import FAMILIES
from tinychat.tokenizer import Tokenizer
from tinychat.weights import DenseLinear, Linear, bf16_to_f32

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4"}  # BF16 as its bits
MAX_JSON = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PULL_AGAIN = "The folder is damaged or incomplete; pull or convert it again."


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies: safetensors dtype, shape, file, offset in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int


class HFCheckpoint:
    """Implements `Checkpoint` for a folder in Hugging Face layout.

    Opening reads the JSON files and the safetensors headers only; a weight is a view of the mapped file until
    it is used. Raises CheckpointError for a damaged folder and UnsupportedModelError for a kind not read.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder)
        self.json = _read_json(self.path / "config.json")
        if self.json is None:
            raise ModelNotFoundError(
                f"{self.path} has no config.json.", "Give a folder in Hugging Face layout, or a .gguf file."
            )
        generation = _read_json(self.path / "generation_config.json")
        self.config = ModelConfig.from_hf(self.json, generation)
        self.quantization = _read_quantization(self.path, self.json)
        self._tensors = _read_headers(self.path)
        self._maps: dict[Path, np.memmap] = {}
        self._shapes = _expected_shapes(self.config)

    def has(self, name: str) -> bool:
        return name + ".weight" in self._tensors or name + ".qweight" in self._tensors

    def linear(self, name: str) -> Linear:
        if name + ".qweight" in self._tensors:
            return self._awq(name)
        weight = self._tensors.get(name + ".weight")
        if weight is None:
            raise CheckpointError(f"{self.path.name} has no weights for {name}.", PULL_AGAIN)
        if weight.dtype not in ("F32", "F16", "BF16"):
            raise UnsupportedModelError(
                f"{name}.weight is stored as {weight.dtype}, which is not supported.",
                "Supported: F32, F16, BF16, and AutoAWQ's 4-bit gemm layout.",
            )
        self._check_shape(name + ".weight", self._shapes.get(name, weight.shape))
        return DenseLinear(
            self._array(name + ".weight"), self._bias(name, weight.shape[0]), bf16=weight.dtype == "BF16"
        )

    def vector(self, name: str) -> np.ndarray:
        self._check_shape(name + ".weight", self._shapes.get(name, (self.config.hidden_size,)))
        values = self._float32(name + ".weight")
        if not np.isfinite(values).all():
            raise CheckpointError(f"The weights of {name} hold NaN or infinity.", PULL_AGAIN)
        return values

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_hf(self.path)

    def fingerprint(self) -> str:
        """sha256 over path, size and modification time of the files that say what the weights are."""
        h = hashlib.sha256(str(self.path.resolve()).encode())
        files = {t.file for t in self._tensors.values()} | {self.path / "config.json"}
        for file in sorted(files):
            stat = file.stat()
            h.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return h.hexdigest()

    def _awq(self, name: str) -> Linear:
        if self.quantization is None:
            raise UnsupportedModelError(
                f"{name} is quantized, but config.json has no quantization_config that says how.",
                "Only AutoAWQ's gemm layout is read: quant_method awq, version gemm, bits 4.",
            )
        expected = self._shapes.get(name)
        if expected is None:
            raise UnsupportedModelError(
                f"{name} is quantized to 4 bits, which is supported in the model's blocks only.",
                "Quantize the checkpoint again with the embedding and the output head in 16 bits.",
            )
        n, k = expected
        group = self.quantization["group_size"]
        group = k if group == -1 else group
        if k % group or n % 8:
            raise UnsupportedModelError(
                f"{name} is {n} × {k}, which group size {group} (and 8 codes a word) does not divide.",
                "Quantize the model again with a group size that divides it (128, 64 or 32).",
            )
        expected_shapes = {"qweight": (k, n // 8), "scales": (k // group, n), "qzeros": (k // group, n // 8)}
        symmetric = not self.quantization["zero_point"] and name + ".qzeros" not in self._tensors
        arrays = {}
        for part, shape in expected_shapes.items():
            if part == "qzeros" and symmetric:
                arrays[part] = None
                continue
            self._check_shape(
                f"{name}.{part}", shape, ("F16", "F32", "BF16") if part == "scales" else ("I32",)
            )
            bf16 = self._tensors[f"{name}.{part}"].dtype == "BF16"
            arrays[part] = self._float32(f"{name}.{part}") if bf16 else self._array(f"{name}.{part}")
        return awq.unpack(**arrays, bias=self._bias(name, n))

    def _bias(self, name: str, n: int) -> np.ndarray | None:
        wanted = (
            self.config.attention_bias if "self_attn" in name else self.config.mlp_bias and ".mlp." in name
        )
        if name + ".bias" not in self._tensors and not wanted:
            return None
        self._check_shape(name + ".bias", (n,))
        return self._float32(name + ".bias")

    def _check_shape(
        self, tensor: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ("F32", "F16", "BF16")
    ) -> None:
        t = self._tensors.get(tensor)
        if t is None:
            raise CheckpointError(f"{self.path.name} has no tensor {tensor}.", PULL_AGAIN)
        if t.shape != shape:
            raise CheckpointError(
                f"{tensor} has the shape {list(t.shape)}; config.json says {list(shape)}.",
                "The weights and config.json do not belong together; pull or convert the model again.",
            )
        if t.dtype not in dtypes:
            raise UnsupportedModelError(
                f"{tensor} is stored as {t.dtype}, which is not supported there.",
                f"Supported: {', '.join(dtypes)}.",
            )

    def _array(self, tensor: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        t = self._tensors[tensor]
        if t.file not in self._maps:
            self._maps[t.file] = np.memmap(t.file, np.uint8, mode="r")
        dtype = np.dtype(DTYPES[t.dtype])
        end = t.offset + dtype.itemsize * int(np.prod(t.shape, dtype=np.int64))
        raw = np.asarray(self._maps[t.file])[t.offset : end]
        if t.offset % dtype.itemsize:
            raw = raw.copy()  # the format does not promise alignment
        return raw.view(dtype).reshape(t.shape)

    def _float32(self, tensor: str) -> np.ndarray:
        a = self._array(tensor)
        return bf16_to_f32(a) if self._tensors[tensor].dtype == "BF16" else a.astype(np.float32)


def _expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every module of the model and the shape of its weight."""
    table = (cfg.vocab_size, cfg.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": table,
        "lm_head": table,
        "model.norm": (cfg.hidden_size,),
    }
    for layer in range(cfg.n_layers):
        shapes.update(FAMILIES[cfg.family].linears(cfg, layer))
    return shapes


def _read_json(path: Path) -> dict[str, Any] | None:
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


def _read_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """group_size (−1: the whole row) and zero_point of an AutoAWQ gemm checkpoint; None when not quantized.

    Raises UnsupportedModelError for any other method, version or width, by name.
    """
    q = config.get("quantization_config")
    if q is None and (old := _read_json(folder / "quant_config.json")) is not None:  # AutoAWQ before 0.1.6
        q = {
            "quant_method": "awq",
            "version": old.get("version", "gemm"),
            "bits": old.get("w_bit"),
            "group_size": old.get("q_group_size"),
            "zero_point": old.get("zero_point", True),
        }
    if q is None:
        return None
    if not isinstance(q, dict):
        raise CheckpointError(f"quantization_config is {q!r}, not an object.", PULL_AGAIN)
    todo = "Supported: unquantized weights, and AWQ in AutoAWQ's gemm layout with 4 bits."
    method = str(q.get("quant_method", "(none)")).lower()
    if method != "awq":
        raise UnsupportedModelError(f"The quantization method {method!r} is not supported.", todo)
    version = str(q.get("version", "gemm")).lower()
    if version != "gemm" or q.get("backend") == "llm-awq":
        name = "llm-awq" if version == "gemm" else version
        raise UnsupportedModelError(f"The AWQ layout {name!r} is not supported.", todo)
    bits = q.get("bits", q.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedModelError(f"AWQ with {bits!r} bits is not supported.", todo)
    group = q.get("group_size", q.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or 1 <= group <= 1 << 20):
        raise CheckpointError(f"The quantization group size {group!r} makes no sense.", PULL_AGAIN)
    return {"group_size": group, "zero_point": bool(q.get("zero_point", True))}


def _read_headers(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of the folder's safetensors, from one file or from the shards that the index names."""
    index = _read_json(folder / "model.safetensors.index.json")
    if index is None:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return _read_header(files[0])
        if files:
            raise CheckpointError(
                f"{folder.name} has {len(files)} safetensors files and no model.safetensors.index.json.",
                PULL_AGAIN,
            )
        if any(next(folder.glob(p), None) for p in PICKLES):
            raise UnsupportedModelError(
                f"{folder.name} holds its weights as pickle files, which can run code when they are read.",
                "Convert them to safetensors, or choose a repository that has them.",
            )
        raise CheckpointError(f"{folder.name} holds no *.safetensors.", PULL_AGAIN)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("model.safetensors.index.json has no weight_map.", PULL_AGAIN)
    tensors: dict[str, _Tensor] = {}
    shards: dict[str, dict[str, _Tensor]] = {}
    for tensor, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or Path(file).name != file
            or "\\" in file
        ):
            raise CheckpointError(
                f"model.safetensors.index.json names {file!r}, which is not a plain file name.",
                "The folder may be hostile; pull it from a source that you trust.",
            )
        if file not in shards:
            if not (folder / file).is_file():
                raise CheckpointError(f"The shard {file} is missing.", PULL_AGAIN)
            shards[file] = _read_header(folder / file)
        if tensor not in shards[file]:
            raise CheckpointError(f"The shard {file} does not hold {tensor}, as the index says.", PULL_AGAIN)
        tensors[tensor] = shards[file][tensor]
    return tensors


def _read_header(file: Path) -> dict[str, _Tensor]:
    """The tensors of one safetensors file. The safetensors library checks header, sizes and offsets first."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as e:
        raise CheckpointError(f"{file.name} is not a sound safetensors file: {e}.", PULL_AGAIN) from e
    header.pop("__metadata__", None)
    return {
        name: _Tensor(t["dtype"], tuple(t["shape"]), file, 8 + length + t["data_offsets"][0])
        for name, t in header.items()
    }
