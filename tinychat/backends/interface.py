"""Contract of a backend with the engine: the memories of a model, the steps over it, and their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.network.config import AttentionConfig, ModelConfig

BLOCK = 16  # slots in a KV block
STRETCH = 4 * BLOCK  # slots: a row reads its own stretch of a memory in 4 bits exactly
LARGEST_ROWS = 64  # rows of which `step_largest` gives the largest logits


@dataclass(frozen=True)
class MemorySpec:
    """One kind of memory that a model needs, for the layers that are alike in it.

    kind         paged: keys and values of every token. window: of the last `window` tokens (what lies behind
                 is never read again, so its blocks may be given back). state: a fixed number of bytes a
                 sequence. tail: the blocks that rows of another memory, which is in 4 bits, read exactly, in
                 16 bits
    layers       which layers of the model, ascending; arrays of one memory have their layers in this order
    kv_heads, head_dim  of paged, window and tail memories
    window       tokens that a token attends to, itself included; of window memories
    latent       last values of a key that are the token's value too, so that only keys are stored (latent
                 attention); 0: keys and values are stored apart
    state_bytes  of one sequence, all its layers together; of state memories
    of           index of the memory whose blocks it holds; of tail memories
    stretch      a found prefix has a multiple of so many tokens; more than BLOCK beside a tail
    """

    kind: Literal["paged", "window", "state", "tail"]
    layers: tuple[int, ...]
    kv_heads: int = 0
    head_dim: int = 0
    window: int = 0
    state_bytes: int = 0
    of: int = -1
    latent: int = 0
    stretch: int = BLOCK

    @property
    def sides(self) -> int:
        """Rows of a token that are stored for each head: its key and its value, or one that is both."""
        return 1 if self.latent else 2


def memories_of(cfg: ModelConfig) -> tuple[MemorySpec, ...]:
    """Memories that a sequence needs, in the order in which a span names them."""
    alike: dict[tuple[int, int, int, int], list[int]] = {}
    states: dict[int, list[int]] = {}
    for i, layer in enumerate(cfg.all_layers):
        for a in (layer.mixer, layer.beside):
            if not isinstance(a, AttentionConfig):
                if a is not None:
                    states.setdefault(a.state_size, []).append(i)
            elif a.source < 0:  # else they are in the memory of the layer that wrote them
                latent = a.latent.rank if a.latent else 0
                alike.setdefault((a.window, a.n_kv_heads, a.head_dim, latent), []).append(i)
    if cfg.further is not None:  # its attention, and the hidden state that it goes on from
        states.setdefault(cfg.handed_on, []).append(cfg.n_layers)
    return tuple(
        MemorySpec(
            "window" if shape[0] else "paged", tuple(alike[shape]), *shape[1:3], shape[0], latent=shape[3]
        )
        for shape in sorted(alike)  # those that see everything come first
    ) + tuple(
        MemorySpec("state", tuple(layers), state_bytes=4 * size * len(layers))
        for size, layers in states.items()
    )


def with_tails(memories: tuple[MemorySpec, ...]) -> tuple[MemorySpec, ...]:
    """The same memories, with keys and values in 4 bits: a tail for each that has any, behind them all.

    Raises UnsupportedModelError for latent rows, of which one value stands for those of all heads.
    """
    if any(spec.latent for spec in memories):
        raise UnsupportedModelError(
            "A model with latent attention caches one short row a token, which is not kept in 4 bits.",
            "Use --kv-bits 16 or 8.",
        )
    memories = tuple(replace(spec, stretch=STRETCH) for spec in memories)
    kv = [(m, spec) for m, spec in enumerate(memories) if spec.kind in ("paged", "window")]
    return *memories, *(replace(spec, kind="tail", window=0, of=m) for m, spec in kv)


def tail_of(memories: tuple[MemorySpec, ...], memory: int) -> int | None:
    """Index of the tail of a memory, if it has one."""
    return next((m for m, spec in enumerate(memories) if spec.kind == "tail" and spec.of == memory), None)


def place_of(memories: tuple[MemorySpec, ...], layer: int) -> tuple[int, int]:
    """Index of the memory that holds a layer's keys and values, and of the layer in it."""
    kv = ((m, spec) for m, spec in enumerate(memories) if spec.kind not in ("state", "tail"))
    return next((m, spec.layers.index(layer)) for m, spec in kv if layer in spec.layers)


def state_place(memories: tuple[MemorySpec, ...], layer: int) -> tuple[int, int]:
    """Index of the memory that holds a layer's state, and of the layer in it."""
    states = ((m, spec) for m, spec in enumerate(memories) if spec.kind == "state")
    return next((m, spec.layers.index(layer)) for m, spec in states if layer in spec.layers)


@dataclass(frozen=True)
class Slots:
    """Place of a span in a paged or a window memory.

    table        int32 [n]: logical slot s is slot `s % BLOCK` of pool block `table[s // BLOCK]`; covers
                 length + T slots. In a window memory the entries of blocks wholly behind the window of the
                 first row are never read and may be anything
    length       tokens that are there already: row i is written to logical slot `length + i` and attends to
                 the logical slots 0 … length + i, in a window memory to the last `window` of these
    scores       float32 [R or 1, layers, kv_heads, n ≥ length + T], or None: to these is added the attention
                 probability that each slot gets from the last `scored_rows` rows (R of them), summed over the
                 query heads of its KV head; with a first dimension of 1, that of all rows, in their order
    """

    table: np.ndarray
    length: int
    scores: np.ndarray | None = None
    scored_rows: int = 0


@dataclass(frozen=True)
class States:
    """States that a span reads and leaves in a state memory.

    source  the slot that holds the state before the first row; -1: the sequence begins, its state is zero
    kept    int32 [T]: the slot that gets the state behind each row, -1 where nobody needs it. Rolling back a
            draft means to go on from an earlier row's slot; `source` may be among them

    Rows go through a state one by one in their order, so a sequence has the same states however it is cut.
    """

    source: int
    kept: np.ndarray


@dataclass(frozen=True)
class Tails:
    """Blocks that a span reads and leaves in a tail memory.

    blocks  int32 [n], for each block of the other memory's table: where it is in 16 bits, and left there if
            the span's T rows are written to it; -1 where nobody needs that

    A row reads the stretch of STRETCH slots that it lies in exactly, as far as itself, in a paged memory the
    first block as well (the first tokens are looked at by all others), and everything else in 4 bits. So what
    it sees does not depend on how its sequence was cut, and rows that are taken back leave no trace: a block
    is stored in 4 bits when its last slot is written, as often as that happens. Therefore `blocks` has every
    block of a stretch that began before the span, all or none of any other, and in a paged memory the first
    one, unless the span begins with it.
    """

    blocks: np.ndarray


@dataclass(frozen=True)
class Span:
    """T consecutive tokens of one sequence in a step.

    token_ids    int32 [T]
    position     rotary position of the first token; the others follow
    logits_from  rows from this one on get logits (T: none at all, the memories are filled only)
    memories     what the span has in each memory of the backend, in the order of `Backend.memories`
    """

    token_ids: np.ndarray
    position: int
    logits_from: int
    memories: tuple[Slots | States | Tails, ...]


@dataclass(frozen=True)
class Step:
    """The inputs of one pass over the weights: at most `max_spans` spans of different sequences, `max_rows`
    rows in all.

    What a span gets does not depend, in a single bit, on the spans beside it.

    further: the layer that predicts further runs in place of the network, over one row of each sequence, with
    what the last rows have left in its memories; only these are written. few: where the head is much
    larger, only the first `further.FEW` token ids get logits, all others minus infinity.
    """

    spans: tuple[Span, ...]
    further: bool = False
    few: bool = False

    @property
    def asked_rows(self) -> int:
        """Rows that get logits, of all spans."""
        return sum([len(span.token_ids) - span.logits_from for span in self.spans])

    @staticmethod
    def of(
        token_ids: np.ndarray,
        position: int,
        length: int,
        table: np.ndarray,
        logits_from: int,
        scores: np.ndarray | None = None,
        scored_rows: int = 0,
        memories: int = 1,
    ) -> Step:
        """One span, in paged and window memories that have the same blocks; scores: in the first."""
        slots = (Slots(table, length, scores, scored_rows), *[Slots(table, length)] * (memories - 1))
        return Step((Span(token_ids, position, logits_from, slots),))


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

    Every memory is a pool of blocks: of BLOCK slots, or of one state each in a state memory, where slots and
    the calls about them do not exist. `memory` is an index of `memories`.
    """

    name: str
    row_independent: bool  # whether a row's result is bitwise the same whatever runs with it
    max_rows: int  # rows a step may have; longer prompts are prefilled in chunks
    max_spans: int  # spans a step may have
    survives_fork: bool  # whether it can go on in a forked process
    predicts: bool  # whether it takes steps of the layer that predicts further

    def describe(self) -> dict[str, Any]:
        """Facts of what runs: backend, isa, act_bits, kv_bits, threads."""
        ...

    memories: tuple[MemorySpec, ...]  # what each sequence needs

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        """Layers of that memory, and KV heads of each."""
        ...

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        """Bytes that one block takes, all layers: keys and values of BLOCK slots, or a state."""
        ...

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        """Have a pool of so many blocks. If it grows, the blocks that were there stay as they are. Raises
        MemoryBudgetError; then the pool is what it was.
        """
        ...

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        """Copy a pool block, all layers (copy-on-write)."""
        ...

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        """Contents of the blocks, to be kept on disk: uint8 [n blocks, kv_bytes_per_block]."""
        ...

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        """Write what `read_blocks` gave into these blocks."""
        ...

    # Below, `exact` has for each block of the table the block of the memory's tail that is its exact form, or
    # -1: int32 [blocks]; None: the memory has no tail. It names what rows behind the last slot read, no more.

    def move_slots(
        self,
        block_table: np.ndarray,
        src: np.ndarray,
        dst: np.ndarray,
        memory: int = 0,
        slots: int = 0,
        exact: np.ndarray | None = None,
        fresh: np.ndarray | None = None,
    ) -> None:
        """Keys and values of the logical slots `src` over those of `dst`: int32 [layers, kv_heads, n], and
        nothing where src is negative. Eviction fills the holes with the last slots.

        slots: how many are in use, of which the last n are given up. A memory with a tail wants to know.
        fresh: like `exact`, of further blocks that get an exact form afterwards, as they are read.
        """
        ...

    def value_spread(
        self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> np.ndarray:
        """How far the value of each slot lies from the weighted mean of all of them, for the first n slots:
        Euclidean norms, float32 [layers, kv_heads, n].

        weights: as many, not negative, of any sum; where all are zero, they count alike.
        """
        ...

    def turn_keys(
        self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> None:
        """Rotate the cached keys of the first n slots by `delta` positions: int32 [layers, kv_heads, n]."""
        ...

    def step(self, step: Step) -> np.ndarray:
        """Run the network. float32 [asked rows, vocab], span after span; the array is the caller's."""
        ...

    def step_greedy(self, step: Step) -> np.ndarray:
        """Like `step`, but the argmax of each asked row (lowest id on a tie): int32 [asked rows]. -1:
        a logit is NaN or infinite, and there is nothing to choose.
        """
        ...

    @property
    def step_largest(self) -> Callable[[Step, float], list[LargestLogits]] | None:
        """Like `step`, of a backend far from the host: a few kilobytes in place of each row, of which there
        may be LARGEST_ROWS; the number is the temperature of their totals, or 0 for none. None where rows
        are at hand.
        """
        ...

    def free_memory(self) -> int:
        """Bytes that can still be had where its memories lie."""
        ...

    def bandwidth(self) -> float:
        """GB/s at which that memory is read (on a GPU: copied, bytes read and written): the measure for
        decoding.
        """
        ...

    def close(self) -> None:
        """Release threads and memory. Idempotent."""
        ...
