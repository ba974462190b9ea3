"""The KV cache on the device: blocks, scores, eviction, drafts and prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import IDS, TABLE, cuda, truth
from emulation import needs_device
from families import relative_error
from tiny import TinyCheckpoint, tiny_model

from tinychat.backends.interface import Step
from tinychat.base.errors import MemoryBudgetError
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.speculator import Speculator

pytestmark = needs_device


@pytest.mark.parametrize(("rows", "watched", "apart"), [(1, 1, True), (5, 5, True), (40, 32, False)])
def test_scores_are_the_references(rows, watched, apart):
    checkpoint, scores = TinyCheckpoint(3), []
    for b in (truth(checkpoint), cuda(checkpoint)):
        b.step(Step.of(IDS[:50], 0, 0, TABLE, 50))
        s = np.full((watched if apart else 1, 2, 2, 50 + rows), 2, np.float32)
        b.step(Step.of(IDS[50 : 50 + rows], 50, 50, TABLE, rows, s, watched))
        scores.append(s - 2)  # they are added to what is there
    np.testing.assert_allclose(scores[1], scores[0], atol=3e-3 * (1 if apart else watched))
    assert scores[1].sum() == pytest.approx(watched * 2 * 4, rel=1e-3)  # layers · heads


def test_a_prompts_scores_have_the_same_bits_however_it_is_cut():
    seen = []
    for cut in ([40], [24, 16], [8, 7, 25]):
        b = cuda(TinyCheckpoint(3))
        b.step(Step.of(IDS[:50], 0, 0, TABLE, 50))
        scores, at, voted = np.full((1, 2, 2, 90), 0.1, np.float32), 50, 0
        for n in cut:
            voters = max(0, min(n, at + n - 58))  # the last 32 of them
            b.step(Step.of(IDS[at : at + n], at, at, TABLE, n, scores if voters else None, voters))
            at, voted = at + n, voted + voters
        assert voted == 32
        seen.append(scores)
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


@pytest.mark.parametrize("bits", [16, 8])
def test_the_spread_of_values_is_the_references(bits):
    checkpoint, spread = TinyCheckpoint(3), []
    weights = np.random.default_rng(0).random((2, 2, 77)).astype(np.float32)
    weights[1, 0] = 0
    for b in (truth(checkpoint, kv_bits=bits), cuda(checkpoint, kv_bits=bits)):
        b.step(Step.of(IDS[:90], 0, 0, TABLE, 90))
        spread.append(b.value_spread(TABLE, weights))
    assert spread[1].dtype == np.float32
    assert relative_error(spread[1], spread[0]) < 5e-3
    np.testing.assert_array_equal(b.value_spread(TABLE, weights), spread[1])


@pytest.mark.parametrize("trained", [10**9, 110])
def test_logits_after_an_eviction_are_the_references(trained):
    """Sinks and the most recent: victims do not depend on roundings. 110: keys are turned as well."""
    out = []
    for backend in ("reference", "cuda"):
        with tiny_model(ctx=256, backend=backend) as m:
            m.engine.trained_context = trained
            branch = m.engine.branch(EvictionPolicy("window", 96, 4, 40))
            out.append([m.engine.run(branch, [int(t)], 0)[0] for t in IDS[:135]])
            assert branch.evicted >= 48
    assert relative_error(np.array(out[1]), np.array(out[0])) < 5e-3


def test_a_pool_that_grows_keeps_what_it_holds():
    with tiny_model(ctx=64, backend="cuda") as m:
        branch, ids = m.engine.branch(), [int(t) for t in IDS[:40]]
        m.engine.run(branch, ids, 40)
        expected = m.engine.run(branch.fork(), [5], 0)
        m.backend.allocate_kv(m.engine.memories.pools[0].n_blocks + 40)
        m.engine.memories.pools[0].grow(40)
        np.testing.assert_array_equal(m.engine.run(branch, [5], 0), expected)
        with pytest.raises(MemoryBudgetError):
            m.backend.allocate_kv(1 << 40)
        np.testing.assert_array_equal(m.engine.run(branch, [5], 0), m.logits([*ids, 5, 5])[-1:])


class Foresight:
    """Drafts what an earlier run said, every fifth token wrong: windows of all lengths, accepted and not."""

    name, slow = "foresight", False

    def __init__(self, ids):
        self.ids = ids

    def begin(self, context, branch):
        self.start = len(context)

    def propose(self, context, k, params, seed, guide=None):
        at = len(context) - self.start
        return Draft([(t + 1) % 258 if i % 5 == 4 else t for i, t in enumerate(self.ids)][at : at + k])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_chunks_and_eviction_leave_the_answer_as_it_is(temperature, monkeypatch):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=45, top_k=2)
    prompt, answers = [int(t) for t in IDS[:144]], []
    for chunk in (None, 16):
        with tiny_model(ctx=256, backend="cuda", eos_ids=()) as m:
            m.tokenizer.eos_ids = frozenset()
            speculator = Speculator()
            if chunk:
                monkeypatch.setattr(m.engine.scheduler, "chunk_size", lambda _, n=chunk: n)
                speculator = Speculator(Foresight(answers[0]), Controller(7))
            branch = m.engine.branch(EvictionPolicy.of("h2o", 112))
            *_, done = m.engine.generate(branch, prompt, params, speculator=speculator)
            answers.append(done.completion.token_ids)
            assert done.stats.evicted_tokens >= 64
    assert done.stats.accepted_tokens > 20
    assert done.stats.drafted_tokens - done.stats.accepted_tokens > 5
    assert len(answers[0]) == 45
    assert answers[0] == answers[1]


def test_the_prefix_cache_changes_nothing():
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        options = dict(temperature=0, max_tokens=20)
        prompt = [int(t) for t in IDS[:70]]
        *_, first = m.generate(prompt, **options)
        *_, again = m.generate(prompt, **options)
        assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 64)
        assert first.completion.token_ids == again.completion.token_ids
