"""Shape of a head that drafts for a model out of its hidden states, and that lies in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.network.checks import check_number, damaged


@dataclass(frozen=True)
class HeadConfig:
    """What a head has beside its one layer (`ModelConfig.further`).

    hidden_size      of the head: what it hands on from row to row
    vocab_size       tokens that it may guess
    taps             layers of the model whose input is a part of what it sees; as many as there are layers:
                     what is behind the last
    norm_eps         epsilon of its norms
    normed_residual  its residual begins with the hidden state behind a norm, not before it
    own_embedding    it has an embedding of its own; else it reads the model's
    own_head         it has an output head of its own; else it takes the model's
    """

    hidden_size: int
    vocab_size: int
    taps: tuple[int, ...]
    norm_eps: float = 1e-6
    normed_residual: bool = False
    own_embedding: bool = False
    own_head: bool = True

    def __post_init__(self) -> None:
        check_number("hidden_size", self.hidden_size, 1 << 17)
        check_number("draft_vocab_size", self.vocab_size, 1 << 22)
        if not 0 < self.norm_eps < 1:
            raise damaged(f"The head has norm epsilon {self.norm_eps!r}.")
