"""Room behind a branch for rows of the layer that predicts further: nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tinychat.backends.interface import Slots, Span, States, Tails
from tinychat.engine.memory.branch import Branch
from tinychat.engine.memory.pool import PoolExhaustedError
from tinychat.engine.memory.state import State


class Ahead:
    """Rows behind a branch, one after the other: in its blocks, where the next step writes as well, and with
    states of their own.
    """

    def __init__(self, branch: Branch, memory: int, states: tuple[int, int]):
        """memory: that of the layer's hidden state. states: slots of it that take turns."""
        self.branch, self.memory, self.states = branch, memory, states
        self.rows = 0
        part = branch.parts[memory]
        assert isinstance(part, State)
        self._last = part.current  # the slot of the state before the next row

    def span(self, token: int) -> Span:
        """The next row, of that token."""
        branch, to = self.branch, self.states[self.rows % 2]
        memories: list[Slots | States | Tails] = []
        for m, part in enumerate(branch.parts):
            if not isinstance(part, State):
                memories.append(part.span(branch.filled(part) + self.rows))
            elif m == self.memory:
                memories.append(States(self._last, np.array([to], np.int32)))
            else:
                memories.append(NO_STATE)
        position = branch.position + self.rows
        self.rows, self._last = self.rows + 1, to
        return Span(np.array([token], np.int32), position, 0, tuple(memories))


NO_STATE = States(-1, np.array([-1], np.int32))


@contextmanager
def ahead(branch: Branch, memory: int, n: int) -> Iterator[Ahead]:
    """Room for n rows behind the branch; given back in the end. memory: that of the layer's hidden state.

    Raises PoolExhaustedError.
    """
    pool = branch.parts[memory].pool
    states: list[int] = []
    try:
        for part in branch.parts:
            if not isinstance(part, State):
                part.reserve(branch.filled(part), n, each=True)
        if pool.available() < 2:
            raise PoolExhaustedError(pool)
        states += [pool.allocate(), pool.allocate()]
        yield Ahead(branch, memory, (states[0], states[1]))
    finally:
        for slot in states:
            pool.release(slot)
        branch.drop_empty_blocks()
