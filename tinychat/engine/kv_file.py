"""The KV cache of a conversation on disk: a resumed chat speaks at once instead of reading itself again.

A safetensors file: the blocks in the backend's own layout, the token ids, and what eviction knows of them. It
is believed only if it says that it belongs to this very model, backend and layout; whatever is wrong with it,
the conversation is read again and the file is set aside. Nothing here decides what is right: ids that differ
from the conversation's are found by `Branch.match` like any other prefix.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.base.files import read_bytes
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.memory.state import State
from tinychat.engine.memory.window import Window

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.engine.engine import OwnedBranch

VERSION = 6
SECRET = 32  # bytes
WORTH = 64  # tokens; fewer are read again as fast
LEDGER = ("tokens", "positions", "born", "scores")


class DamagedKvError(TinychatError):
    """The file is not what it should be."""


def checksum(tensors: dict[str, np.ndarray]) -> str:
    """CRC-32 over all tensors in the order of their names: a flipped bit in a key would be a wrong answer."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _secret() -> bytes:
    """Bytes that only this user's programs know; made when they are wanted first. Raises OSError."""
    path = locations.home() / "memory.key"
    with suppress(FileNotFoundError):
        secret = read_bytes(path)
        if len(secret) == SECRET:
            return secret
        path.unlink()  # damaged
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(secrets.token_bytes(SECRET))
        with suppress(FileExistsError):  # another process was first
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    return read_bytes(path)


def seal(tensors: dict[str, np.ndarray], about: dict[str, str]) -> str:
    """Seal in place of a checksum, where a stranger may leave files: only this user's programs can make it,
    because keys and values that do not follow from the ids beside them would be words that nobody sees.

    Raises OSError where the secret cannot be had.
    """
    code = hashlib.blake2b(key=_secret(), digest_size=32)
    code.update(json.dumps(sorted(about.items())).encode())
    for name in sorted(tensors):
        a = np.ascontiguousarray(tensors[name])
        code.update(f"{name} {a.dtype} {a.shape}".encode())
        code.update(a.reshape(-1).view(np.uint8).data)
    return code.hexdigest()


def beside(path: Path) -> Path:
    """File for the KV cache of a conversation that the user saved under `path`."""
    return path.with_name(f"{path.name}.kv")


def identity(model: ChatModel) -> str:
    """Whatever decides what keys and values are: model, weights, backend, precision, layout."""
    facts = {k: v for k, v in model.backend.describe().items() if k not in ("threads", "isa", "in_ram")}
    what = [VERSION, model.checkpoint.fingerprint(), repr(model.policy), sorted(facts.items())]
    what.append(repr(list(dict.fromkeys(a.rope for a in model.config.attentions))))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True)
class Copy:
    """What a branch holds, in this program's memory: the content of a file."""

    tensors: dict[str, np.ndarray]
    about: dict[str, str]


def copied(model: ChatModel, branch: OwnedBranch, notes: str = "") -> Copy | None:
    """A copy of what the branch holds, while the engine is `changing`. None if it is not worth it, or larger
    than the model's `kv_disk_budget` alone. notes: kept with it.
    """
    engine = model.engine
    if engine.closed:  # its keys and values are gone; those of an earlier save stay
        return None
    saved = [part.saved(branch.filled(part)) for part in branch.parts]
    prompts = {}  # of how many tokens those are whose windows are saved too
    for memory, part in enumerate(branch.parts):
        if isinstance(part, Window) and not branch.evicted:
            prompts[memory], blocks = part.saved_prompt(len(branch))
            saved[memory] = [*saved[memory], *blocks]
    size = sum(len(s) * engine.backend.kv_bytes_per_block(memory) for memory, s in enumerate(saved))
    if len(branch) < WORTH or size > model.kv_disk_budget:
        return None
    tensors = {"ids": np.array(branch.ids, np.int32)}
    for memory, blocks in enumerate(saved):
        tensors[f"memory{memory}"] = engine.backend.read_blocks(np.array(blocks, np.int32), memory)
        if isinstance(part := branch.parts[memory], State):
            tensors[f"places{memory}"] = np.array(part.places(len(branch)), np.int32)
        elif prompts.get(memory):
            tensors[f"places{memory}"] = np.array([len(branch), prompts[memory]], np.int32)
    about = {"tinychat_kv": identity(model), "evicted": str(branch.evicted)}
    if ledger := branch.ledger:
        tensors |= {name: np.ascontiguousarray(getattr(ledger, name)) for name in LEDGER}
        about |= {"next_position": str(ledger.next_position), "seen": str(ledger.seen)}
    return Copy(tensors, {**about, "notes": notes} if notes else about)


def save(path: Path, model: ChatModel, branch: OwnedBranch, stored: bool = True) -> bool:
    """Write what the branch holds, atomically, readable by its owner only. False if it is not worth it, or
    larger than the model's `kv_disk_budget` alone.

    stored, and what is raised: as of `write`.
    """
    with model.engine.changing():
        copy = copied(model, branch)
    if copy is not None:
        write(path, model, copy, stored)
    return copy is not None


def write(path: Path, model: ChatModel, copy: Copy, stored: bool = True) -> None:
    """Write a file.

    stored: in the chat store, where files of chats spoken in longest ago go when all together are larger than
    the model's `kv_disk_budget`; else in a folder of the user's, sealed.
    Raises TinychatError when the disk is full.
    """
    tensors, about = copy.tensors, dict(copy.about)
    try:
        about |= {"crc32": checksum(tensors)} if stored else {"seal": seal(tensors, about)}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
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
    if stored:
        _stay_within(path, model.kv_disk_budget)


def about(path: Path, model: ChatModel) -> tuple[list[int], str] | None:
    """The ids of a file and the notes in it; None if it is another model's. Raises as a damaged one does."""
    with safe_open(path, "numpy") as f:
        said = f.metadata() or {}
        if said.get("tinychat_kv") != identity(model):
            return None
        return f.get_tensor("ids").tolist(), said.get("notes", "[]")


def _stay_within(path: Path, disk_budget: int) -> None:
    files = [(p.stat().st_mtime, p.stat().st_size, p) for p in path.parent.glob("*.safetensors*")]
    total = sum(size for _, size, _ in files)
    for _, size, p in sorted(files):
        if total <= disk_budget or p == path:
            continue
        with suppress(OSError):
            p.unlink()
            total -= size


def load(path: Path, model: ChatModel, branch: OwnedBranch, stored: bool = True) -> int:
    """Fill a branch from the file; how many tokens that gives, 0 if there is none, or it is another
    model's or too large.

    stored: as `save` was told.
    Raises DamagedKvError when the file is broken; in the store it has been set aside as `….damaged` then.
    """
    if (
        model.engine.closed
        or not os.path.isfile(path)
        or path.stat().st_size > model.kv_disk_budget + (1 << 28)
    ):
        return 0
    try:
        with safe_open(path, "numpy") as f:
            about = f.metadata() or {}
            if about.get("tinychat_kv") != identity(model):
                return 0
            read = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        if stored and about["crc32"] != checksum(read):
            raise ValueError("checksum")
        if not stored and not hmac.compare_digest(about.pop("seal"), seal(read, about)):
            raise ValueError("seal")
        return _adopt(model, branch, about, read)
    except PoolExhaustedError:
        return 0  # no room for it: read again as far as there is
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
        with model.engine.changing():
            branch.free()
        if not stored:
            raise DamagedKvError(
                f"The KV cache in {path.name} was not saved on this computer, or it is damaged.",
                "The conversation is read again.",
            ) from e
        aside = path.with_suffix(".damaged")
        with suppress(OSError):
            os.replace(path, aside)
        raise DamagedKvError(
            f"The saved KV cache of this chat is damaged ({type(e).__name__}).",
            f"It was set aside as {aside.name}; the conversation is read again.",
        ) from e


def _adopt(model: ChatModel, branch: OwnedBranch, about: dict[str, str], read: dict[str, np.ndarray]) -> int:
    engine, evicted = model.engine, int(about["evicted"])
    ids, memories = read["ids"], [read[f"memory{i}"] for i in range(len(branch.parts))]
    if ids.dtype != np.int32 or ids.ndim != 1 or not 0 <= evicted < len(ids):
        raise ValueError("shapes")
    if (ids < 0).any() or (ids >= model.config.vocab_size).any():
        raise ValueError("ids")
    slots = len(ids) - evicted
    for i, (part, blocks) in enumerate(zip(branch.parts, memories, strict=True)):
        if isinstance(part, State):
            part.expect(_places(read[f"places{i}"], len(ids)))
        elif isinstance(part, Window):
            places = read.get(f"places{i}")
            part.expect([len(ids)] if places is None else _places(places, len(ids)))
            if places is not None and evicted:
                raise ValueError("places")
        expected = (part.blocks_of(slots if part.thinned else len(ids)), engine.backend.kv_bytes_per_block(i))
        if blocks.dtype != np.uint8 or blocks.shape != expected:
            raise ValueError("shapes")
    if slots > engine.n_ctx or (evicted and (branch.ledger is None or slots > branch.ledger.policy.budget)):
        return 0  # made under other settings
    ledger = branch.ledger if "positions" in read else None
    if evicted and ledger is None:
        raise ValueError("positions")
    if ledger is not None:
        _check_ledger(ledger.shape, slots, len(ids), about, read)
    with engine.changing():
        branch.free()
        engine.make(branch, len(ids), evicted)
        for i, (part, blocks) in enumerate(zip(branch.parts, memories, strict=True)):
            held = part.held()  # of what is beside the last window, as much as there is room for
            engine.backend.write_blocks(np.array(held, np.int32), blocks[: len(held)], i)
        branch.restore(ids.tolist(), evicted)
        if ledger is not None:
            tokens, positions, born, scores = (read[name] for name in LEDGER)
            next_position, seen = int(about["next_position"]), int(about["seen"])
            ledger.restore(tokens, positions, born, scores, next_position, seen, evicted)
    return len(ids)


def _places(given: np.ndarray, length: int) -> list[int]:
    """Numbers of tokens behind which one can go on, the first behind all. Raises ValueError."""
    if given.dtype != np.int32 or given.ndim != 1 or not 1 <= len(given) <= 2 or given[0] != length:
        raise ValueError("places")
    return given.tolist()


def _check_ledger(
    heads: tuple[int, int], slots: int, n_ids: int, about: dict[str, str], read: dict[str, np.ndarray]
) -> None:
    """Raises ValueError where what is known of the slots makes no sense."""
    for name, kind in zip(LEDGER, (np.int32, np.int32, np.int32, np.float32), strict=True):
        if read[name].shape != (*heads, slots) or read[name].dtype != kind:
            raise ValueError(name)
    end = int(about["next_position"])
    if not (0 < end < 1 << 30 and 0 <= int(about["seen"]) < 1 << 30):
        raise ValueError("counts")
    for name, limit in (("positions", end), ("tokens", n_ids)):
        there = np.sort(read[name], axis=-1)
        if there.size and (there.min() < 0 or there.max() >= limit or (np.diff(there) < 1).any()):
            raise ValueError(name)
