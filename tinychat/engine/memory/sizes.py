"""How large the pool of each memory is: what one conversation needs, and room for snapshots."""

from __future__ import annotations

from collections.abc import Sequence

from tinychat.backends.interface import BLOCK, STRETCH, Backend, MemorySpec
from tinychat.engine.memory import state, window
from tinychat.engine.memory.branch import Part
from tinychat.engine.memory.paged import Paged
from tinychat.engine.memory.pool import BlockPool
from tinychat.engine.memory.state import State
from tinychat.engine.memory.tail import Tail
from tinychat.engine.memory.window import Window

SPARE = 2  # blocks beside a full context: copy-on-write of the last one never fails for want of one
LEAST_SPACING, MOST_SPACING = 256, 4096  # tokens between two snapshots in a long text


def _window_blocks(spec: MemorySpec) -> int:
    return -(-spec.window // BLOCK) + spec.stretch // BLOCK


def blocks_of_one(spec: MemorySpec, n: int, rows: int) -> int:
    """Blocks (of a state memory: slots) that a branch of n tokens needs at most, written in steps of so many
    rows.
    """
    if spec.kind == "state":
        return 3 + max(state.ROWS, 3 + rows // LEAST_SPACING)
    if spec.kind == "tail":
        # The first block; the stretch before, the one that a step begins in and the one it ends in.
        return 1 + 3 * STRETCH // BLOCK + -(-state.ROWS // BLOCK) + SPARE
    whole = -(-n // BLOCK) + SPARE
    if spec.kind == "window":
        return min(whole, _window_blocks(spec) + -(-rows // BLOCK) + 1 + SPARE)
    return whole


def blocks_at_first(spec: MemorySpec, n: int, rows: int) -> int:
    """Blocks or slots of a pool for one conversation of n tokens, with its snapshots."""
    one = blocks_of_one(spec, n, rows)
    if spec.kind == "state":
        return one + 2 + state.SNAPSHOTS  # and what a fork holds
    if spec.kind == "tail":
        return one + 2  # likewise
    if spec.kind == "window":
        return min(-(-n // BLOCK) + SPARE, one + window.SNAPSHOTS * _window_blocks(spec))
    return one


def memory_bytes(backend: Backend, n: int) -> int:
    """Bytes of the pools that a context of n tokens begins with."""
    return sum(
        blocks_at_first(spec, n, backend.max_rows) * backend.kv_bytes_per_block(i)
        for i, spec in enumerate(backend.memories)
    )


def tokens_within(backend: Backend, room: int, most: int) -> int:
    """The longest context, in whole blocks and not a block longer than `most`, whose pools take `room`
    bytes.
    """
    low, high = 0, -(-most // BLOCK) + 1  # blocks that fit, and that do not or are not wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_bytes(backend, middle * BLOCK) <= room else (low, middle)
    return low * BLOCK


def snapshot_spacing(backend: Backend) -> int:
    """Tokens between two snapshots in a long text, the same for all memories: those of a window hold at most
    a quarter of the text, those of a state take at most a quarter of what its keys and values take.
    """
    windows = [4 * spec.window for spec in backend.memories if spec.kind == "window"]
    states = any(spec.kind == "state" for spec in backend.memories)
    tokens = max([*windows, _state_spacing(backend) if states else 0, LEAST_SPACING])
    stretch = max(spec.stretch for spec in backend.memories)
    return -(-tokens // stretch) * stretch


def _state_spacing(backend: Backend) -> int:
    sizes: dict[str, int] = {}
    for i, spec in enumerate(backend.memories):
        sizes[spec.kind] = sizes.get(spec.kind, 0) + backend.kv_bytes_per_block(i)
    if not sizes.get("paged"):
        return MOST_SPACING
    blocks = -(-4 * sizes.get("state", 0) // sizes["paged"])
    return min(blocks * BLOCK, MOST_SPACING)


def new_parts(specs: Sequence[MemorySpec], pools: Sequence[BlockPool], spacing: int) -> list[Part]:
    """Parts of an empty branch, one for each memory."""
    parts: list[Part] = []
    for spec, pool in zip(specs, pools, strict=True):
        if spec.kind == "paged":
            parts.append(Paged(pool))
        elif spec.kind == "window":
            parts.append(Window(pool, spec.window, spacing, spec.stretch))
        elif spec.kind == "state":
            parts.append(State(pool, spacing, spec.stretch))
        elif spec.kind == "tail":
            parts.append(Tail(pool, thinned=specs[spec.of].kind == "paged"))
        else:
            raise NotImplementedError(spec.kind)
    return parts
