"""Backends over the tiny model, fed the same ids: what the tests of tests/backends share."""

from __future__ import annotations

import numpy as np
from emulation import bench

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import Step
from tinychat.backends.reference import ReferenceBackend

BLOCKS = 24
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
IDS = np.random.default_rng(1).integers(0, 258, 300).astype(np.int32)


def cpu(checkpoint, policy=None, **options) -> CpuBackend:
    b = CpuBackend(checkpoint, policy, **options)
    b.allocate_kv(BLOCKS)
    return b


def cuda(checkpoint, policy=None, **options) -> CudaBackend:
    b = CudaBackend(checkpoint, policy, modules=bench().modules, **options)
    b.allocate_kv(BLOCKS)
    return b


def truth(checkpoint, policy=None, **options) -> ReferenceBackend:
    b = ReferenceBackend(checkpoint, policy, **options)
    b.allocate_kv(BLOCKS)
    return b


def run(backend, ids, cuts, greedy=False):
    """All logits (or ids), the rows fed in pieces of these sizes."""
    at, out = 0, []
    for n in cuts:
        step = Step.of(ids[at : at + n], at, at, TABLE, 0)
        out.append(backend.step_greedy(step) if greedy else backend.step(step))
        at += n
    return np.concatenate(out)
