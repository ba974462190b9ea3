"""What a generation knows of the engine that it lives in, what it asks of it, and what it may go on with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tinychat.backends.interface import Backend
from tinychat.engine.owned import OwnedBranch
from tinychat.engine.scheduler import Rows
from tinychat.text.tokenizer import Tokenizer


class Home(Protocol):
    """Facts that a generation needs of the engine that it lives in."""

    backend: Backend
    tokenizer: Tokenizer
    n_ctx: int
    trained_context: int

    def changing(self) -> AbstractContextManager[None]:
        """Context for one change of branches."""
        ...

    def kv_bytes(self) -> int:
        """Bytes of the KV pool that hold something."""
        ...


@dataclass(frozen=True)
class Room:
    """A sequence wants room for n tokens: others hold all the memory, or took what it had."""

    branch: OwnedBranch
    n: int
    cancel: threading.Event


Wish = Rows | Room


@dataclass(frozen=True)
class Begun:
    """An answer that goes on: the ids of what it has, and what was said of it (`Completion.written`)."""

    ids: Sequence[int] = ()
    written: str = ""


NOTHING = Begun()
