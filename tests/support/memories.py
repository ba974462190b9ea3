"""Steps of one sequence over a backend with several memories."""

from __future__ import annotations

from tinychat.backends.interface import Step


def allocate(backend, blocks):
    """As many blocks in each of its memories; the backend."""
    for memory in range(len(backend.memories)):
        backend.allocate_kv(blocks, memory)
    return backend


def step_of(backend, *args):
    """One span, with the same table in each memory."""
    return Step.of(*args, memories=len(backend.memories))
