"""Latent attention: a token is one cached row, and every form of computing it gives the same."""

from __future__ import annotations

import numpy as np
import pytest
from families import LATENT_CASES, FromTransformers, logits_of, random_model, relative_error
from memories import allocate, step_of

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.network.weight_policy import WeightPolicy

N, BLOCKS = 200, 16
IDS = np.random.default_rng(1).integers(0, 258, N).astype(np.int32)
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)


def run(backend, cuts=(90, 1, 1, 7, 101)):
    allocate(backend, BLOCKS)
    ends = np.cumsum(cuts)
    return np.concatenate(
        [backend.step(step_of(backend, IDS[e - n : e], e - n, e - n, TABLE, 0)) for n, e in zip(cuts, ends)]  # noqa: B905
    )


@pytest.mark.parametrize("case", LATENT_CASES)
def test_logits_equal_transformers(case):
    cls, changes = LATENT_CASES[case]
    hf = random_model(cls, **changes)
    theirs = logits_of(hf, IDS)
    backend = ReferenceBackend(FromTransformers(hf), WeightPolicy("none", 16))
    assert relative_error(run(backend), theirs) < 1e-4
    a = backend.cfg.layers[0].attention
    assert backend.kv_bytes_per_block() == 16 * 3 * 4 * (changes["kv_lora_rank"] + a.latent.rotated)


def test_a_cache_of_4_bits_is_refused_in_words():
    cls, changes = LATENT_CASES["deepseek2moe"]
    checkpoint = FromTransformers(random_model(cls, **changes))
    with pytest.raises(UnsupportedModelError, match="not kept in 4 bits"):
        ReferenceBackend(checkpoint, WeightPolicy("none", 16), kv_bits=4)
