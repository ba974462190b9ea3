"""The demo model's CPU kernels against the fp32 reference, teacher-forced over 2,000 positions of text."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np
import pytest

import tinychat
from tinychat.engine.sampling import log_softmax

POSITIONS = 2000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ids(demo_gguf):
    with tinychat.load(demo_gguf, device="reference", ctx=512) as m:
        text = "\n\n".join(
            topics[name] for name in ("customization", "exprlists", "typesseq", "with", "compound")
        )
        ids = m.tokenizer.encode(text)
    assert len(ids) > POSITIONS
    return ids[: POSITIONS + 1]


@pytest.fixture(scope="module")
def reference(demo_gguf, ids):
    return logits(demo_gguf, ids, device="reference")


def logits(model, ids, **options):
    """float32 [POSITIONS, vocab], in windows that the context holds."""
    with tinychat.load(model, ctx=2048, draft="none", **options) as m:
        return m.logits(ids[:-1])


def perplexity(rows, ids):
    return float(np.exp(-np.mean([log_softmax(r)[t] for r, t in zip(rows, ids[1:], strict=True)])))


def misses(rows, reference):
    """By how much the reference prefers its own choice, at each position where they differ."""
    chosen, best = rows.argmax(1), reference.argmax(1)
    at = np.flatnonzero(chosen != best)
    return reference[at, best[at]] - reference[at, chosen[at]]


def test_16_bit_activations_choose_as_the_reference_but_for_near_ties(demo_gguf, ids, reference):
    rows = logits(demo_gguf, ids, act_bits=16)
    missed = misses(rows, reference)
    print(
        f"16 bits: {1 - len(missed) / POSITIONS:.2%} the same argmax, worst miss {missed.max(initial=0):.4f}"
    )
    assert len(missed) <= 0.01 * POSITIONS
    assert missed.max(initial=0) <= 0.05


def test_8_bit_activations_cost_less_than_half_a_per_cent(demo_gguf, ids, reference):
    rows, exact = logits(demo_gguf, ids, act_bits=8), logits(demo_gguf, ids, act_bits=16)
    same = 1 - len(misses(rows, reference)) / POSITIONS
    ratio = perplexity(rows, ids) / perplexity(exact, ids)
    print(f"8 bits: {same:.2%} the same argmax, perplexity {ratio - 1:+.3%} against 16 bits")
    assert same >= 0.97
    assert ratio <= 1.005


def test_an_8_bit_cache_costs_less_than_a_fifth_of_a_per_cent(demo_gguf, ids):
    full, small = (logits(demo_gguf, ids, act_bits=16, kv_bits=bits) for bits in (16, 8))
    ratio = perplexity(small, ids) / perplexity(full, ids)
    print(f"8-bit cache: perplexity {ratio - 1:+.3%}")
    assert ratio <= 1.002
