"""Steps of one sequence over a backend with several memories."""

from __future__ import annotations

import numpy as np

from tinychat.backends.interface import Span, States, Step


def allocate(backend, blocks):
    """As many blocks in each of its memories; the backend."""
    for memory in range(len(backend.memories)):
        backend.allocate_kv(blocks, memory)
    return backend


def state_slot(length):
    """Slot of the state behind so many tokens; none behind none."""
    return length % 8 if length else -1


def step_of(backend, ids, position, length, *args):
    """One span, with the same table in each memory of keys and values; the state behind the last row is kept
    where a step from there on looks for it.
    """
    (span,) = Step.of(ids, position, length, *args, memories=len(backend.memories)).spans
    kept = np.full(len(ids), -1, np.int32)
    kept[-1:] = state_slot(length + len(ids))
    states = States(state_slot(length), kept)
    kinds = [spec.kind for spec in backend.memories]
    memories = tuple(
        states if kind == "state" else has for kind, has in zip(kinds, span.memories, strict=True)
    )
    return Step((Span(span.token_ids, span.position, span.logits_from, memories),))
