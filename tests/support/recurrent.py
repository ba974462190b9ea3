"""A tiny model that has every kind of memory: full attention, a sliding window, and a recurrent layer.

It runs on the torch reference, whose results depend on how many rows run at once; so its rows run one by one.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from tiny import TinyCheckpoint

from tinychat.backends import reference
from tinychat.backends.interface import MemorySpec, Slots, Span, States, Step
from tinychat.models import llama
from tinychat.network.weight_policy import WeightPolicy

RECURRENT = 2  # the layer that has a state in place of keys and values
WINDOW = 24
HIDDEN = 64


def block(ops, cfg, w, x, layer):
    """Llama's, but one layer mixes by a gated running mean."""
    if layer != RECURRENT:
        return llama.block(ops, cfg, w, x, layer)
    rows = ops.linear(ops.rms_norm(x, w.attn_norm, cfg.norm_eps), w.qkv)
    x = ops.linear(ops.recur(rows, layer, update), w.o, add_to=x)
    gate_up = ops.linear(ops.rms_norm(x, w.mlp_norm, cfg.norm_eps), w.gate_up)
    return ops.linear(ops.silu_mul(gate_up), w.down, add_to=x)


def update(state, row):
    """The next state, and what comes out. row: a gate and an input for each value."""
    gate = torch.sigmoid(row[:HIDDEN] + 1)
    state = gate * state + (1 - gate) * row[HIDDEN:]
    return state, torch.tanh(state) * 2


class Family:
    """What the backend wants of a family."""

    load = staticmethod(llama.load)

    @staticmethod
    def forward(ops, cfg, w):
        return llama.forward(ops, cfg, w, block)


def one_row(has, i, n, previous, scratch):
    """What row i of n has in one memory, and where its state goes."""
    if isinstance(has, States):
        kept = int(has.kept[i]) if has.kept[i] >= 0 else scratch
        return States(has.source if i == 0 else previous, np.array([kept], np.int32)), kept
    voter, scores = i - (n - has.scored_rows), has.scores
    if scores is None or voter < 0:
        return Slots(has.table, has.length + i), previous
    row = scores[voter : voter + 1] if len(scores) == has.scored_rows else scores
    return Slots(has.table, has.length + i, row, 1), previous


class RecurrentBackend(reference.ReferenceBackend):
    row_independent = True
    max_rows = 64

    def __init__(self, checkpoint, kinds):
        paged, window, state = (
            MemorySpec("paged", (0,), 2, 16),
            MemorySpec("window", (1,), 2, 16, WINDOW),
            MemorySpec("state", (RECURRENT,), state_bytes=4 * HIDDEN),
        )
        if "window" not in kinds:
            paged, window = MemorySpec("paged", (0, 1), 2, 16), None
        memories = tuple(spec for spec in (paged, window, state) if spec)
        with patch.object(reference, "memories_of", lambda cfg: memories):
            super().__init__(checkpoint, WeightPolicy("none", 16), threads=1)
        self.family, self.scratch = Family, 0

    def allocate_kv(self, n_blocks, memory=0):
        if self.memories[memory].kind == "state":
            self.scratch, n_blocks = n_blocks, n_blocks + 1
        super().allocate_kv(n_blocks, memory)

    def step(self, step):
        out = [self._row(span, i) for span in step.spans for i in self._begin_span(span)]
        return np.concatenate(out)

    def _begin_span(self, span):
        self._previous = -1
        return range(len(span.token_ids))

    def _row(self, span, i):
        memories, previous = [], self._previous
        for has in span.memories:
            row, kept = one_row(has, i, len(span.token_ids), previous, self.scratch)
            memories.append(row)
            if isinstance(row, States):
                self._previous = kept
        alone = Span(span.token_ids[i : i + 1], span.position + i, int(i < span.logits_from), tuple(memories))
        return super().step(Step((alone,)))


def recurrent_model(ctx=256, kinds=("window", "state"), grows=True, **changes):
    """A Model of that kind."""
    from tinychat.base.load_options import LoadOptions
    from tinychat.loading import Drafts
    from tinychat.model import Model

    windows = dict(window=WINDOW, windowed_layers=(1,)) if "window" in kinds else {}
    checkpoint = TinyCheckpoint(n_layers=3, **windows, **changes)
    backend = RecurrentBackend(checkpoint, kinds)
    options = LoadOptions(ctx=ctx, quantize="none", head_bits=16)
    model = Model(checkpoint, backend, "recurrent", options, Drafts(options))
    if not grows:
        model.engine.memories.more_bytes = lambda: 0
    return model
