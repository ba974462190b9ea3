"""What quantization writes, whole or not at all; and the kind that is a folder in Hugging Face's layout.

While it grows, everything lies in `.NAME.partial` beside it: one file a finished block, each renamed into
place, so a run that was killed goes on where it stopped when the same job is started again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import read_text
from tinychat.base.machine import human_bytes
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.quantize.forward import finite
from tinychat.quantize.layouts import as_stored
from tinychat.quantize.linears import left_alone
from tinychat.quantize.settings import hf_config, one_or_many
from tinychat.quantize.target import Target
from tinychat.text.chat_templates import FOLDER
from tinychat.text.tokenizer import Tokenizer

RECORD = "quantize.json"  # says how the folder was made, and so that it is ours to replace
SHARD_BYTES = 5_000_000_000
DTYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}
WIDTHS = {"F16": 2, "F32": 4, "I32": 4, "I64": 8, "I8": 1, "U8": 1}
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "generation_config.json",
)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `read` is called once, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, a: np.ndarray) -> Entry:
        return cls(name, DTYPES[a.dtype.name], a.shape, lambda: a)

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * WIDTHS[self.dtype]


def write_safetensors(path: Path, entries: Iterable[Entry]) -> None:
    """One safetensors file, tensor by tensor, so that no more than one is in memory."""
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.n_bytes]}
        at += e.n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for e in entries:
            a = np.ascontiguousarray(e.read())
            assert a.nbytes == e.n_bytes, e.name
            f.write(a.astype(a.dtype.newbyteorder("<"), copy=False).data)
        f.flush()
        os.fsync(f.fileno())


class Output:
    """What is written to `out` by `job` (what decides its content; JSON), in blocks that a later run finds.

    Kinds of output say how the whole is put together (`write`), which one may be replaced (`is_ours`), and
    how that is done (`replace`).
    """

    def __init__(self, out: Path, job: dict[str, Any]):
        self.out = Path(os.path.abspath(out))
        self.job = job
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self._lock: int | None = None

    def __enter__(self) -> Output:
        """Check that `out` may be written, and take up what an earlier run of the same job has left."""
        self._check_replaceable()
        with disk_errors(self.out):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                os.close(self._lock)
                raise UsageError(
                    f"Another tinychat is writing {self.out}.", "Wait for it, or choose another --out."
                ) from e
            job = self.partial / "job.json"
            if not job.is_file() or _json_or_none(job) != self.job:
                for leftover in self.partial.iterdir():
                    if leftover.name != "lock":
                        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                _write_json(job, self.job)
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def block(self, layer: int) -> dict[str, np.ndarray] | None:
        """The tensors of a finished block, or None; a file that is not sound counts as not finished."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self._block_path(layer)
        try:
            return load_file(path) if path.is_file() else None
        except (SafetensorError, OSError, ValueError):
            return None

    def write_block(self, layer: int, tensors: dict[str, np.ndarray], tuned: bool = False) -> None:
        """Keep a finished block; `tuned`: beside the one that it was tuned from."""
        path = self._block_path(layer, tuned)
        with disk_errors(self.out):
            temporary = path.with_suffix(".tmp")
            write_safetensors(temporary, [Entry.of(k, v) for k, v in tensors.items()])
            os.replace(temporary, path)

    def finish(
        self, checkpoint: Checkpoint, target: Target, rest: list[Entry], record: dict[str, Any]
    ) -> None:
        """Put the blocks and `rest` (embedding, final norm, head) together, and move it into place."""
        with disk_errors(self.out):
            new = self.partial / "new"
            shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
            self.write(new, checkpoint, target, rest, record)
            self._check_replaceable()
            self.replace(new)
            shutil.rmtree(self.partial)

    def write(
        self, path: Path, checkpoint: Checkpoint, target: Target, rest: list[Entry], record: dict[str, Any]
    ) -> None:
        """The whole, to `path`."""
        raise NotImplementedError

    def is_ours(self) -> bool:
        """Whether what is there may be replaced."""
        raise NotImplementedError

    def replace(self, new: Path) -> None:
        """Move `new` to where it belongs."""
        raise NotImplementedError

    def size(self) -> int:
        """Bytes of what was written."""
        raise NotImplementedError

    def _block_path(self, layer: int, tuned: bool = False) -> Path:
        return self.partial / f"{'tuned' if tuned else 'block'}-{layer:05d}.safetensors"

    def _block_entries(self, n_layers: int) -> Iterator[Entry]:
        from safetensors import safe_open

        for layer in range(n_layers):
            path = self._block_path(layer, tuned=self._block_path(layer, tuned=True).is_file())
            with safe_open(path, framework="numpy") as f:
                for name in f.keys():  # noqa: SIM118 (not a mapping)
                    s = f.get_slice(name)
                    yield Entry(name, s.get_dtype(), tuple(s.get_shape()), partial(_read, path, name))

    def _check_replaceable(self) -> None:
        if self.out.exists() and not self.is_ours():
            raise UsageError(
                f"{self.out} exists and was not made by tinychat quantize.",
                "Choose another --out, or delete it first.",
            )


class OutputFolder(Output):
    """The folder `out`, in Hugging Face's layout."""

    def write(
        self, path: Path, checkpoint: Checkpoint, target: Target, rest: list[Entry], record: dict[str, Any]
    ) -> None:
        path.mkdir()
        cfg = checkpoint.config
        write_weights(path, [as_written(cfg, e) for e in (*rest, *self._block_entries(cfg.n_layers))])
        left = sorted({in_files(cfg, f"{name}.weight").removesuffix(".weight") for name in left_alone(cfg)})
        write_settings(path, checkpoint, target.quantization_config(left))
        _write_json(path / RECORD, {**self.job, **record})

    def is_ours(self) -> bool:
        """Whether it was made by quantizing, or is empty."""
        return self.out.is_dir() and ((self.out / RECORD).is_file() or not any(self.out.iterdir()))

    def replace(self, new: Path) -> None:
        if self.out.exists():
            old = self.partial / "old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(new, self.out)

    def size(self) -> int:
        """Bytes of its files."""
        return sum(f.stat().st_size for f in self.out.iterdir())


def as_written(cfg: ModelConfig, entry: Entry) -> Entry:
    """The tensor by the name that its family's files have for it."""
    return replace(entry, name=in_files(cfg, entry.name))


def in_files(cfg: ModelConfig, tensor: str) -> str:
    """The name that a family's files have for a tensor of a module of ours."""
    for module, own in next(iter(FAMILIES[cfg.family].HF.values())).written:
        tensor = re.sub(module, own, tensor)
    return tensor


def rest(checkpoint: Checkpoint) -> list[Entry]:
    """Weights that stay in 16 bits: embedding, final norm, and the head where it is not the embedding."""
    cfg = checkpoint.config

    def half(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return finite(checkpoint.linear(name).dequantize().astype(np.float16), name)

    names = ["model.embed_tokens"] + ([] if cfg.tie_embeddings else ["lm_head"])
    shapes = {name: tuple(checkpoint.linear(name).shape) for name in names}
    entries = [Entry(f"{n}.weight", "F16", shape, partial(half, n)) for n, shape in shapes.items()]
    norms = as_stored("model.norm", checkpoint.vector("model.norm"), cfg)
    return [*entries, *(Entry.of(name, finite(norm, "model.norm")) for name, norm in norms.items())]


def write_weights(folder: Path, entries: list[Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or shards with their index when there are more than `shard_bytes`."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for e in entries:
        if shards[-1] and size + e.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(e)
        size += e.n_bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {e.name: name for e in shard}
    total = sum(e.n_bytes for e in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def write_settings(folder: Path, checkpoint: Checkpoint, quantization: dict[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    source = getattr(checkpoint, "settings", None)  # a Hugging Face folder's own, kept as they are
    config = dict(source) if source is not None else hf_config(checkpoint.config)
    config["torch_dtype"] = "float16"
    config.pop("dtype", None)
    config["quantization_config"] = quantization
    tokenizer = checkpoint.tokenizer()
    if source is not None:
        for name in COPIED:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        for file in (checkpoint.path / FOLDER).glob("*.jinja"):
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / FOLDER / file.name)
    else:
        tokenizer.save(folder)
    if not (folder / "generation_config.json").is_file():
        _write_json(folder / "generation_config.json", _generation(checkpoint.config, tokenizer))
    _write_json(folder / "config.json", config)


def _generation(c: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = list(c.eos_ids) + sorted(set(tokenizer.eos_ids) - set(c.eos_ids))
    return {"bos_token_id": c.bos_id, "eos_token_id": one_or_many(ids), "do_sample": True}


def _read(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as f:
        return f.get_tensor(name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _json_or_none(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """OSErrors of writing become errors that a user can act on."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = 0
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(out.parent).free
            raise TinychatError(
                f"No space left for {out} ({human_bytes(free)} free).",
                "Free some space and give the same command again: finished blocks are kept.",
            ) from e
        raise TinychatError(
            f"{e.filename or out} cannot be written: {e.strerror or e}.", "Choose another --out."
        ) from e
