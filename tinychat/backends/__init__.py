"""Backends run a model's ops: `reference` (torch, fp32, plain: the truth), `cpu` (SIMD kernels), `cuda`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BLOCK = 16  # slots in a KV block


@dataclass(frozen=True)
class Step:
    """The inputs of one pass over the weights, for T consecutive tokens of one sequence.

    token_ids    int32 [T]
    position     rotary position of the first token; the others follow
    length       tokens that the cache holds already: row i is written to logical slot `length + i` and
                 attends to the
                 logical slots 0 … length + i
    block_table  int32 [n]: logical slot s is slot `s % BLOCK` of pool block `block_table[s // BLOCK]`;
                 covers length + T slots
    logits_from  rows from this one on get logits (T: none at all, the cache is filled only)
    scores       float32 [R or 1, layers, kv_heads, n ≥ length + T], or None: to these is added the attention
                 probability that each slot gets from the last `scored_rows` rows (R of them), summed over the
                 query heads of its KV head; with a first dimension of 1, that of all rows, in their order
    """

    token_ids: np.ndarray
    position: int
    length: int
    block_table: np.ndarray
    logits_from: int
    scores: np.ndarray | None = None
    scored_rows: int = 0


@dataclass(frozen=True)
class LargestLogits:
    """A row of logits as far as choosing a token needs it, where the whole row lies far away.

    ids     int64 [k]: where the largest are, best first, the lowest id first among equals, NaN before all;
            k may be 0
    values  float32 [k]
    n       logits of the row
    total   the sum of exp((logit - largest) / temperature) over the whole row, or 0 where it is not known
    whole   the row itself, float32 [n]; only until the backend's next step
    """

    ids: np.ndarray
    values: np.ndarray
    n: int
    total: float
    whole: Callable[[], np.ndarray]

    TOTAL_WITHIN = 1e-4  # of itself, what the total may be off by


class Backend(Protocol):
    """One loaded model on one device. Not thread-safe; the engine serialises.

    A backend far from the host may have `step_largest(step, temperature) -> list[LargestLogits]` too: a few
    kilobytes in place of each row of logits. temperature: of the total, or 0 for none. One that can go on in
    a forked process says so by `survives_fork`; one whose memory is not the machine's has `free_memory()`.
    """

    name: str
    row_independent: bool  # whether a row's result is bitwise the same whatever runs with it
    max_rows: int  # rows a step may have; longer prompts are prefilled in chunks

    def describe(self) -> dict[str, Any]:
        """What runs: backend, isa, act_bits, kv_bits, threads."""
        ...

    def kv_heads(self) -> tuple[int, int]:
        """Layers that have keys and values, and KV heads of each."""
        ...

    def kv_bytes_per_block(self) -> int:
        """Bytes that one block of BLOCK slots takes, all layers, keys and values."""
        ...

    def allocate_kv(self, n_blocks: int) -> None:
        """Have a KV pool of so many blocks. If it grows, the blocks that were there stay as they are. Raises
        MemoryBudgetError; then the pool is what it was.
        """
        ...

    def copy_block(self, src: int, dst: int) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        ...

    def read_blocks(self, block_table: np.ndarray) -> np.ndarray:
        """What the blocks hold, to be kept on disk: uint8 [n blocks, kv_bytes_per_block]."""
        ...

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray) -> None:
        """What `read_blocks` gave, into these blocks."""
        ...

    def move_slots(self, block_table: np.ndarray, src: np.ndarray, dst: np.ndarray) -> None:
        """Keys and values of the logical slots `src` over those of `dst`: int32 [layers, kv_heads, n], and
        nothing where src is negative. Eviction fills the holes with the last slots.
        """
        ...

    def value_spread(self, block_table: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """How far the value of each slot lies from the weighted mean of all of them, for the first n slots:
        Euclidean norms, float32 [layers, kv_heads, n].

        weights: as many, not negative, of any sum; where all are zero, they count alike.
        """
        ...

    def turn_keys(self, block_table: np.ndarray, delta: np.ndarray) -> None:
        """Rotate the cached keys of the first n slots by `delta` positions: int32 [layers, kv_heads, n]."""
        ...

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [T - logits_from, vocab]; the array is the caller's."""
        ...

    def step_greedy(self, step: Step) -> np.ndarray:
        """Like `step`, but the argmax of each asked row (lowest id on a tie): int32 [T - logits_from]. -1:
        a logit is NaN or infinite, and there is nothing to choose.
        """
        ...

    def close(self) -> None:
        """Release threads and memory. Idempotent."""
        ...
