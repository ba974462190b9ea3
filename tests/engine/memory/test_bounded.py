"""What a long conversation keeps in memory, by count: an engine whose backend computes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import byte_tokenizer

from tinychat.backends.interface import BLOCK, MemorySpec
from tinychat.engine.engine import Engine
from tinychat.engine.eviction import EvictionPolicy

# Gemma 3 1B: 26 layers, every sixth with full attention; one KV head of 256, keys and values in 16 bits.
FULL = tuple(range(5, 26, 6))
LOCAL = tuple(i for i in range(26) if i not in FULL)
TOKEN = 2 * 256 * 2  # bytes of a token in one layer
SEEN = 512  # tokens in the window
GEMMA = (MemorySpec("paged", FULL, 1, 256), MemorySpec("window", LOCAL, 1, 256, SEEN))
MISTRAL = (MemorySpec("window", tuple(range(32)), 8, 128, 4096),)


class Idle:
    """A backend of these memories that computes nothing and remembers what it was told."""

    name, row_independent, max_rows, max_spans, step_largest = "idle", True, 512, 1, None

    def __init__(self, memories):
        self.memories, self.blocks, self.turned = memories, {}, []

    def describe(self):
        return {"backend": self.name}

    def kv_heads(self, memory=0):
        return len(self.memories[memory].layers), self.memories[memory].kv_heads

    def kv_bytes_per_block(self, memory=0):
        spec = self.memories[memory]
        return len(spec.layers) * spec.kv_heads * spec.head_dim * 4 * BLOCK

    def allocate_kv(self, n_blocks, memory=0):
        self.blocks[memory] = n_blocks

    def copy_block(self, src, dst, memory=0):
        pass

    def move_slots(self, table, src, dst, memory=0, slots=0, exact=None, fresh=None):
        pass

    def value_spread(self, table, weights, memory=0, exact=None):
        return np.ones_like(weights)

    def turn_keys(self, table, delta, memory=0, exact=None):
        self.turned.append((memory, delta.shape[2], np.unique(delta).tolist()))

    def step(self, step):
        (span,) = step.spans
        for spec, has, n in zip(self.memories, span.memories, self.blocks.values(), strict=True):
            assert (has.table < n).all()
            assert spec.kind == "paged" or has.scores is None
        return np.zeros((len(span.token_ids) - span.logits_from, 1), np.float32)

    def close(self):
        pass


def engine_of(memories, ctx):
    backend = Idle(memories)
    return backend, Engine(backend, byte_tokenizer(), ctx, trained_context=1 << 20)


def read(engine, branch, n, step, seed=0):
    ids = np.random.default_rng(seed).integers(0, 256, n).tolist()
    for i in range(len(branch), n, step):
        engine.run(branch, ids[i : i + step], len(ids[i : i + step]))


@pytest.mark.parametrize("name", ["h2o", "window"])
def test_thirty_thousand_tokens_of_gemma_3_take_windows_and_the_budget(name):
    budget, chunk, snapshots = 2048, 256, 4
    _, engine = engine_of(GEMMA, 32768)
    branch = engine.branch(EvictionPolicy.of(name, budget))
    read(engine, branch, 30_000, chunk)
    assert branch.slots <= budget
    full = len(FULL) * TOKEN * budget
    window = len(LOCAL) * TOKEN * (SEEN + 4 * BLOCK)
    # The window that is in use, a step's rows, and what snapshots keep.
    assert engine.kv_bytes() <= full + window * (1 + snapshots) + len(LOCAL) * TOKEN * 512
    assert engine.kv_bytes() < 0.15 * 26 * TOKEN * 30_000
    held = sum(len(p.held()) * engine.backend.kv_bytes_per_block(i) for i, p in enumerate(branch.parts))
    assert held <= full + window


def test_windows_take_the_same_whatever_the_context():
    taken = []
    for ctx in (8192, 131072):
        backend, _ = engine_of(GEMMA, ctx)
        assert backend.blocks[0] == ctx // BLOCK + 2
        taken.append(backend.blocks[1])
    assert taken[0] == taken[1] < 6 * SEEN / BLOCK + 40
    small, _ = engine_of(GEMMA, 256)  # a context within the window: as if there were none
    assert small.blocks[0] == small.blocks[1] == 256 // BLOCK + 2


def test_a_chat_of_windows_alone_never_ends_and_turns_its_keys_when_positions_run_out():
    backend = Idle(MISTRAL)
    engine = Engine(backend, byte_tokenizer(), 8192, trained_context=16384)
    branch = engine.branch(EvictionPolicy.of("window", 8192))
    read(engine, branch, 40_000, 256)
    assert len(branch) == 40_000
    assert branch.position <= 16384
    assert backend.turned
    for memory, slots, by in backend.turned:
        assert (memory, slots >= 4096, len(by)) == (0, True, 1)
        assert by[0] % BLOCK == 0
        assert by[0] < 0
    assert sum(by[0] for _, _, by in backend.turned) == branch.position - 40_000
    assert len(branch.parts[0].held()) <= 4096 / BLOCK + 2


def test_a_window_pool_grows_for_another_busy_conversation():
    backend, engine = engine_of(GEMMA, 8192)
    engine.memories.more_bytes = lambda: 1 << 30
    first = backend.blocks[1]
    branches = [engine.branch() for _ in range(8)]
    for seed, b in enumerate(branches):
        read(engine, b, 2000, 500, seed)
    assert backend.blocks[1] > first
    assert all(len(b) == 2000 for b in branches)
