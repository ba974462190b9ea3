"""Contract of a loaded model with conversations and their KV files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tinychat.backends.interface import Backend
from tinychat.engine.engine import Engine
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.owned import OwnedBranch
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation.speculator import Speculator
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.text.known_text import Known, KnownText
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer


class Kept(Protocol):
    """Branches between two answers: `tinychat.engine.shelf.Shelf` is one."""

    def take(self, ids: Sequence[int]) -> OwnedBranch: ...

    def put(self, branch: OwnedBranch, texts: Sequence[Known] = ()) -> None: ...


class ChatModel(Protocol):
    """`tinychat.Model` is one; its docstrings say what the members are."""

    name: str
    config: ModelConfig
    checkpoint: Checkpoint
    policy: WeightPolicy
    backend: Backend
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    default_sampling: SamplingParams
    kv_budget: int | None
    kv_disk_budget: int
    known: KnownText

    @property
    def shelf(self) -> Kept | None: ...

    @property
    def n_ctx(self) -> int: ...

    def needs_bos(self, text: str) -> bool: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def eviction(
        self, budget: int | None = None, name: str | None = None, chat: bool = False
    ) -> EvictionPolicy | None: ...

    def speculator(self, draft: str | None = None) -> Speculator: ...
