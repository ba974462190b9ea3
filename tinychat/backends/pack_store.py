"""The packs of this machine: made at first load, one module at a time; checked and mapped afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinychat.backends import pack_check, pack_file
from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.pack_file import FileSink, MemorySink, Pack, PackInMemory
from tinychat.backends.plan import rounded
from tinychat.base import locations
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.family import WeightSource
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import Linear

Tell = Callable[[str], None]
Put = Callable[["np.ndarray | None"], "list[int] | None"]


class Layout(Protocol):
    """How one backend's kernels want weights to lie, and which they read."""

    name: str  # of the layout and its version, in the names of packs
    kernels: Kernels

    def entry(self, w: ExactForm, put: Put) -> dict[str, Any]:
        """Entry of a linear in the index, as JSON; `put` stores an array and says where it is (None: none).

        A list of two numbers in it is such a place.
        """
        ...


class Loads(Protocol):
    """A family, or what else asks a loader for all its weights."""

    def load(self, w: WeightSource, cfg: ModelConfig) -> Any:
        """Ask for every weight, in the order of use."""
        ...


def opened(
    checkpoint: Checkpoint,
    policy: WeightPolicy,
    family: Loads,
    layout: Layout,
    tell: Tell | None = None,
    at_once: bool = False,
) -> Pack:
    """The checkpoint's pack: mapped if there is a sound one, else made (and kept, if the disk has room).

    tell hears of what takes long. at_once: all of it will be read now, so it is checked now.
    Raises CheckpointError for a checkpoint that is changed while it is read.
    """
    path = pack_path(checkpoint, policy, layout, tell)
    pack = pack_check.sound(path, tell, at_once)
    if pack is not None:
        return pack
    if tell is not None and (said := rounded(checkpoint, policy, layout.kernels)) is not None:
        tell(said)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as f:
                Packer(checkpoint, policy, layout, FileSink(f, path.name)).pack(family)
            checkpoint.check_unchanged()  # its name in the cache says what it was made of
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        pack_check.note(path)
        pack = pack_file.read(path)
        if pack is not None:
            return pack
        reason = "it reads back damaged"
    except OSError as e:
        reason = e.strerror or str(e)
    warnings.warn(
        f"The packed weights could not be kept in {path.parent} ({reason}); they stay in memory and will be"
        " made again next time. Free some space, or set TINYCHAT_HOME to another disk.",
        RuntimeWarning,
        stacklevel=2,
    )
    memory = MemorySink()
    index = Packer(checkpoint, policy, layout, memory).pack(family)
    checkpoint.check_unchanged()
    return PackInMemory(memory.parts, index)


def pack_path(checkpoint: Checkpoint, policy: WeightPolicy, layout: Layout, tell: Tell | None = None) -> Path:
    """Path of the pack of these weights in that layout."""
    fingerprint = checkpoint.fingerprint(tell)
    key = f"{fingerprint}|{policy.quantize}|{policy.head_bits}|{layout.name}|{pack_file.VERSION}"
    if checkpoint.config.further is not None:
        key += "|further"
    rest = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pack"
    return locations.packs_dir() / locations.pack_name(fingerprint, rest)


def _sweep(folder: Path) -> None:
    """Remove what processes left that died while packing, and packs that no version reads any more."""
    for f in folder.glob("*.pack"):
        with contextlib.suppress(OSError, struct.error):
            if pack_file.is_outdated(f):
                f.unlink()
    for f in folder.glob("*.partial"):
        pid = f.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            with contextlib.suppress(OSError):
                f.unlink()


class Packer:
    """The loader that a model file asks for its weights while they are packed."""

    def __init__(
        self, checkpoint: Checkpoint, policy: WeightPolicy, layout: Layout, sink: FileSink | MemorySink
    ):
        self.checkpoint, self.policy, self.layout, self.sink = checkpoint, policy, layout, sink
        self.index: dict[str, Any] = {"linears": {}, "vectors": {}}

    def pack(self, family: Loads) -> dict[str, Any]:
        """All weights, one after the other; the index."""
        family.load(self, self.checkpoint.config)
        self.sink.finish(self.index)
        return self.index

    def vector(self, name: str) -> None:
        """A norm's weight."""
        if name not in self.index["vectors"]:
            self.index["vectors"][name] = self._put(np.asarray(self.checkpoint.vector(name), np.float32))

    def linear(self, *names: str) -> None:
        """Linears that share an input."""
        for name in names:
            self._add(name, self.policy.linear(self.checkpoint, name))

    def router(self, name: str) -> None:
        """The linear that chooses experts."""
        self._add(name, self.policy.router(self.checkpoint, name))

    def embedding(self, name: str) -> None:
        """The embedding (rows are token ids)."""
        self._add(name, self.policy.embedding(self.checkpoint, name))

    def head(self, name: str, tied_to: Any) -> None:
        """The output head, where it is not the embedding."""
        head = self.policy.head(self.checkpoint, name)
        if head is not None:
            self._add(name, head)

    def _add(self, name: str, w: Linear) -> None:
        self.index["linears"][name] = self.layout.entry(ExactForm.of(w, self.layout.kernels, name), self._put)

    def _put(self, a: np.ndarray | None) -> list[int] | None:
        return None if a is None else self.sink.put(np.ascontiguousarray(a))
