"""Conversations between two answers: who asks comes back with the whole of one, and most was read already.

The branches of the last answers are kept with their blocks; while memory lasts, the pools grow for them, and
then the one that waited longest makes way. What makes way, and what is there when the program ends, is kept
on disk, and found again by its ids.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat.base.errors import TinychatError
from tinychat.engine import kv_file
from tinychat.engine.memory.branch import common_prefix
from tinychat.text.known_text import Known

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.engine.engine import OwnedBranch

MOST = 64  # branches that are kept
FILES = 256  # on disk; every request is compared with each
TEXTS = 8  # of one conversation whose ids are kept with it
PENDING = 2  # copies of what made way that wait to be written
PREFIX = "served-"


@dataclass(eq=False)
class _Kept:
    """A branch that nobody uses, and the texts whose ids it begins with."""

    branch: OwnedBranch
    texts: list[Known] = field(default_factory=list)
    saved: bool = False  # as it is


@dataclass(eq=False)
class _Filed:
    """The same in a file."""

    ids: array
    texts: list[Known]


class Shelf:
    """Branches of one model. Calls may come from any thread."""

    def __init__(self, model: ChatModel, folder: Path | None = None, most: int = MOST):
        """folder: where files are kept, within the model's `kv_disk_budget`; None: none are."""
        self._model, self._most = model, most
        self._folder = folder if model.kv_disk_budget else None
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []  # used last is last
        self._taken: dict[int, _Kept] = {}  # by the id of a branch that is in use
        self._files: dict[Path, _Filed] = {}
        self._writer = ThreadPoolExecutor(1, "shelf")
        self._pending = 0
        if self._folder is not None:
            self._read_index(self._folder)
            model.engine.makes_way = self._makes_way

    def take(self, ids: Sequence[int]) -> OwnedBranch:
        """A branch that has as much of these ids as there is; it is the caller's until `put`."""
        wanted = array("i", ids)
        with self._lock:
            self._kept = [kept for kept in self._kept if len(kept.branch)]
            whole = [k for k in self._kept if common_prefix(k.branch.ids, wanted) == len(k.branch)]
            kept = max(whole, key=lambda k: len(k.branch), default=None)
            if kept is not None:
                self._kept.remove(kept)
        kept = kept or self._new()
        kept = self._from_disk(kept, wanted) or kept
        with self._lock:
            self._taken[id(kept.branch)] = kept
        return kept.branch

    def put(self, branch: OwnedBranch, texts: Sequence[Known] = ()) -> None:
        """The answer has ended. texts: of which it has the ids now."""
        with self._lock:
            kept = self._taken.pop(id(branch))
            kept.texts = [*kept.texts, *texts][-TEXTS:]
            kept.saved = False
            ids = branch.ids
            for other in list(self._kept):  # what has come farther stands for what it was before
                if common_prefix(other.branch.ids, ids) == len(other.branch):
                    self._kept.remove(other)
            self._kept.append(kept)
            over = self._kept[: -self._most]
        for kept in over:
            self._save(kept)
            with self._lock, suppress(ValueError):
                self._kept.remove(kept)

    def save(self) -> None:
        """Keep on disk what is not there yet. Whatever goes wrong there, a conversation can be read again."""
        with self._lock:
            unsaved = [kept for kept in self._kept if not kept.saved]
        for kept in unsaved:
            self._save(kept)

    def close(self) -> None:
        """Save everything; no more is kept. Idempotent."""
        self.save()
        self._writer.shutdown(wait=True)
        with self._lock:
            self._kept.clear()

    def _new(self) -> _Kept:
        return _Kept(self._model.engine.branch(self._model.eviction()))

    # On disk

    def _read_index(self, folder: Path) -> None:
        for path in sorted(folder.glob(f"{PREFIX}*.safetensors"), key=_age):
            with suppress(Exception):  # whatever is wrong with it, nothing is lost but time
                if not path.is_file() or (found := kv_file.about(path, self._model)) is None:
                    continue
                ids, notes = found
                filed = _Filed(array("i", ids), _texts_of(notes, ids, self._model.config.vocab_size))
                self._files[path] = filed
                for known in filed.texts:
                    self._model.known.restore(known)

    def _from_disk(self, kept: _Kept, ids: array) -> _Kept | None:
        """The conversation of a file, if it has much more of the ids than memory."""
        with self._lock:
            common = {path: common_prefix(filed.ids, ids) for path, filed in self._files.items()}
        path = max(common, key=lambda p: common[p], default=None)
        if path is None or common[path] - len(kept.branch) < kv_file.WORTH:
            return None
        if kept.branch.ledger is None:
            with self._model.engine.changing():
                kept.branch.match(ids)
            if common[path] - len(kept.branch) < kv_file.WORTH:
                return None
        with self._lock:
            filed = self._files.get(path)
        fresh = self._new()
        try:
            if filed is None or not kv_file.load(path, self._model, fresh.branch):
                raise OSError  # others have removed it, or there is no room
        except (OSError, TinychatError):
            with self._lock:
                if not path.is_file():
                    self._files.pop(path, None)
            return None
        fresh.texts = list(filed.texts)
        return fresh

    def _makes_way(self, branch: OwnedBranch) -> None:
        """The engine is about to take what an idle branch holds, while it is changing: only a copy is made
        here, and another thread writes it.
        """
        if self._pending >= PENDING:
            return
        kept = next((k for k in list(self._kept) if k.branch is branch and not k.saved), None)
        copy = None if kept is None else kv_file.copied(self._model, branch, _notes(kept, branch.ids))
        if copy is not None:
            assert kept is not None
            self._pending += 1
            ids, texts = branch.ids[:], list(kept.texts)
            with suppress(RuntimeError):  # it is closed
                self._writer.submit(self._write, ids, texts, copy)

    def _save(self, kept: _Kept) -> None:
        if self._folder is None:
            return
        with suppress(Exception):
            with self._model.engine.changing():
                ids = kept.branch.ids[:]
                copy = kv_file.copied(self._model, kept.branch, _notes(kept, ids))
            kept.saved = True
            if copy is not None:
                self._pending += 1
                self._write(ids, list(kept.texts), copy)

    def _write(self, ids: array, texts: list[Known], copy: kv_file.Copy) -> None:
        assert self._folder is not None
        try:
            name = hashlib.blake2b(ids.tobytes(), key=copy.about["tinychat_kv"][:64].encode(), digest_size=12)
            path = self._folder / f"{PREFIX}{name.hexdigest()}.safetensors"
            kv_file.write(path, self._model, copy)
            with self._lock:
                before = [
                    p
                    for p, f in self._files.items()
                    if p != path and (not p.is_file() or common_prefix(f.ids, ids) == len(f.ids))
                ]
                for old in before:
                    self._forget(old)
                self._files.pop(path, None)
                self._files[path] = _Filed(ids, texts)
                while len(self._files) > FILES:
                    self._forget(next(iter(self._files)))
        except TinychatError:
            pass  # the disk is full
        finally:
            self._pending -= 1

    def _forget(self, path: Path) -> None:
        """Remove a file."""
        del self._files[path]
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another program has removed it
        return 0.0


def _notes(kept: _Kept, ids: array) -> str:
    """The texts, with what their ids are beyond the branch's: its last token may not have been read yet."""
    rows = []
    for known in kept.texts:
        same = common_prefix(known.ids, ids)
        if len(known.ids) - same <= kv_file.WORTH:
            rows.append([known.digest.hex(), known.characters, same, list(known.ids[same:])])
    return json.dumps(rows)


def _texts_of(notes: str, ids: Sequence[int], vocabulary: int) -> list[Known]:
    """What `_notes` wrote. Raises ValueError and the like where that is damaged."""
    out = []
    for digest, characters, same, more in json.loads(notes):
        found = array("i", [*ids[:same], *more])
        if min(found, default=0) < 0 or max(found, default=0) >= vocabulary or characters < 1:
            raise ValueError("ids")
        out.append(Known(bytes.fromhex(digest), int(characters), found))
    return out
