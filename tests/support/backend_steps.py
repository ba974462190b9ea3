"""Backends over the tiny model, fed the same ids: what the tests of tests/backends share."""

from __future__ import annotations

import numpy as np
from emulation import bench
from memories import allocate, step_of

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.reference import ReferenceBackend

BLOCKS = 24
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
IDS = np.random.default_rng(1).integers(0, 258, 300).astype(np.int32)


def cpu(checkpoint, policy=None, **options) -> CpuBackend:
    return allocate(CpuBackend(checkpoint, policy, **options), BLOCKS)


def cuda(checkpoint, policy=None, **options) -> CudaBackend:
    return allocate(CudaBackend(checkpoint, policy, modules=bench().modules, **options), BLOCKS)


def truth(checkpoint, policy=None, **options) -> ReferenceBackend:
    return allocate(ReferenceBackend(checkpoint, policy, **options), BLOCKS)


def run(backend, ids, cuts, greedy=False):
    """All logits (or ids), the rows fed in pieces of these sizes."""
    at, out = 0, []
    for n in cuts:
        step = step_of(backend, ids[at : at + n], at, at, TABLE, 0)
        out.append(backend.step_greedy(step) if greedy else backend.step(step))
        at += n
    return np.concatenate(out)
