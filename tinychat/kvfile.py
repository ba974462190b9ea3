"""The KV cache of a conversation on disk: a resumed chat speaks at once instead of reading itself again.

A safetensors file: the blocks in the backend's own layout, the token ids, and what eviction knows of them. It
is believed only if it says that it belongs to this very model, backend and layout; whatever is wrong with it,
the conversation is read again and the file is set aside. Nothing here decides what is right: ids that differ
from the conversation's are found by `Branch.match` like any other prefix.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinychat.backends import BLOCK
from tinychat.errors import TinychatError
from tinychat.kvcache import PoolExhaustedError

if TYPE_CHECKING:
    from tinychat.engine import OwnedBranch
    from tinychat.model import Model

VERSION = 2
WORTH = 64  # tokens; fewer are read again as fast
LEDGER = ("positions", "born", "scores")


class DamagedKvError(TinychatError):
    """The file is not what it should be."""


def checksum(tensors: dict[str, np.ndarray]) -> str:
    """CRC-32 over all tensors in the order of their names: a flipped bit in a key would be a wrong answer."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"


def identity(model: Model) -> str:
    """Whatever decides what keys and values are: model, weights, backend, precision, layout."""
    facts = {k: v for k, v in model.backend.describe().items() if k not in ("threads", "isa")}
    what = [VERSION, model._checkpoint.fingerprint(), repr(model._policy), sorted(facts.items())]
    what.append(repr((model.config.rope, model.config.local_rope)))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def save(path: Path, model: Model, branch: OwnedBranch) -> bool:
    """Write what the branch holds, atomically, readable by its owner only; files of chats spoken in longest
    ago go when all together are larger than the model's `kv_disk_budget`. False if it is not worth it, or
    larger than the budget alone.

    Raises TinychatError when the disk is full.
    """
    engine, disk_budget = model.engine, model.kv_disk_budget
    with engine.changing():
        size = len(branch.table) * engine.backend.kv_bytes_per_block()
        if branch.slots < WORTH or size > disk_budget:
            return False
        tensors = {
            "ids": np.array(branch.ids, np.int32),
            "blocks": engine.backend.read_blocks(branch.block_table()),
        }
        about = {"tinychat_kv": identity(model), "evicted": str(branch.evicted)}
        if ledger := branch.ledger:
            tensors |= {name: np.ascontiguousarray(getattr(ledger, name)) for name in LEDGER}
            about |= {"next_position": str(ledger.next_position), "seen": str(ledger.seen)}
    about["crc32"] = checksum(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, about)
            os.chmod(temporary, 0o600)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except (OSError, SafetensorError) as e:
        raise TinychatError(
            f"Cannot keep the chat's KV cache: {e}.", "Free some space; the chat itself is kept."
        ) from e
    _stay_within(path, disk_budget)
    return True


def _stay_within(path: Path, disk_budget: int) -> None:
    files = [(p.stat().st_mtime, p.stat().st_size, p) for p in path.parent.glob("*.safetensors*")]
    total = sum(size for _, size, _ in files)
    for _, size, p in sorted(files):
        if total <= disk_budget or p == path:
            continue
        with suppress(OSError):
            p.unlink()
            total -= size


def load(path: Path, model: Model, branch: OwnedBranch) -> int:
    """Fill an empty branch from the file; how many tokens that gives, 0 if there is none or it is another
    model's.

    Raises DamagedKvError when the file is broken; it has been set aside as `….damaged` then.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "numpy") as f:
            about = f.metadata() or {}
            if about.get("tinychat_kv") != identity(model):
                return 0
            read = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        if about["crc32"] != checksum(read):
            raise ValueError("checksum")
        return _adopt(model, branch, about, read)
    except PoolExhaustedError:
        return 0  # no room for it: read again as far as there is
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
        with model.engine.changing():
            branch.free()
        aside = path.with_suffix(".damaged")
        with suppress(OSError):
            os.replace(path, aside)
        raise DamagedKvError(
            f"The saved KV cache of this chat is damaged ({type(e).__name__}).",
            f"It was set aside as {aside.name}; the conversation is read again.",
        ) from e


def _adopt(model: Model, branch: OwnedBranch, about: dict[str, str], read: dict[str, np.ndarray]) -> int:
    engine = model.engine
    ids, blocks, evicted = read["ids"], read["blocks"], int(about["evicted"])
    slots = len(ids) - evicted
    expected = (-(-slots // BLOCK), engine.backend.kv_bytes_per_block())
    if ids.dtype != np.int32 or blocks.dtype != np.uint8 or blocks.shape != expected:
        raise ValueError("shapes")
    if not 0 <= evicted < len(ids) or (ids < 0).any() or (ids >= model.config.vocab_size).any():
        raise ValueError("ids")
    if slots > engine.n_ctx or (evicted and (branch.ledger is None or slots > branch.ledger.policy.budget)):
        return 0  # made under other settings
    watched = "positions" in read and branch.ledger is not None
    if evicted and not watched:
        raise ValueError("positions")
    if watched:
        shape = (*engine.backend.kv_heads(), slots)
        for name, kind in zip(LEDGER, (np.int32, np.int32, np.float32), strict=True):
            if read[name].shape != shape or read[name].dtype != kind:
                raise ValueError(name)
        positions, end = np.sort(read["positions"], axis=-1), int(about["next_position"])
        if not (0 < end < 1 << 30 and 0 <= int(about["seen"]) < 1 << 30):
            raise ValueError("counts")
        if positions.min() < 0 or positions.max() >= end or (np.diff(positions) < 1).any():
            raise ValueError("positions")
    with engine.changing():
        engine.reserve(branch, slots)
        engine.backend.write_blocks(branch.block_table(), blocks)
        branch.restore(ids, evicted)
        if watched:
            branch.ledger.restore(*(read[n] for n in LEDGER), int(about["next_position"]), int(about["seen"]))
    return len(ids)
