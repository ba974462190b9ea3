"""Sampling against transformers' logits processors, and against the distribution it should draw from."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinychat.base.errors import CheckpointError, UsageError
from tinychat.engine.penalties import Penalties, check_bias
from tinychat.engine.sampling import (
    SamplingParams,
    _order,
    candidates,
    choose_seed,
    gumbel,
    log_softmax,
    penalize,
    sample,
)

OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def theirs(logits, seen=(), penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities [vocab] by transformers' processors, in the order its generate() applies them."""
    x = torch.tensor(np.asarray(logits), dtype=torch.float64)[None]
    ids = torch.tensor([list(seen)], dtype=torch.long)
    chain = []
    if penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    for process in chain:
        x = process(ids, x)
    return torch.softmax(x, -1)[0].numpy()


def ours(logits, prompt=(), answer=(), **params):
    """Probabilities [vocab] by tinychat, behind a prompt and the answer so far."""
    params = SamplingParams(**{**OFF, **params})
    ids, p = candidates(logits, params, behind(params, logits, prompt, answer))
    assert len(set(ids.tolist())) == len(ids)
    assert (p[:-1] >= p[1:]).all()
    out = np.zeros(len(logits))
    out[ids] = p
    return out


def behind(params, logits, prompt=(), answer=()):
    return Penalties.of(params, logits, [*prompt, *answer[:1]], answer[1:], len(prompt))


def random_logits(seed, n=300):
    return np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.3),
        dict(temperature=4.0),
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=10_000),
        dict(top_p=0.05),
        dict(top_p=0.5),
        dict(top_p=0.999),
        dict(min_p=0.02),
        dict(min_p=1.0),
        dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05),
        dict(temperature=1.5, top_k=20, top_p=0.7),
    ],
    ids=str,
)
def test_filters_equal_transformers(seed, params):
    logits = random_logits(seed)
    np.testing.assert_allclose(ours(logits, **params), theirs(logits, **params), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits(7)
    seen = np.array([0, 3, 3, 100, 299])
    expected = theirs(logits, seen, penalty=penalty)
    np.testing.assert_allclose(ours(logits, seen, repeat_penalty=penalty), expected, rtol=1e-5)
    everything = dict(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05)
    np.testing.assert_allclose(
        ours(logits, seen, repeat_penalty=penalty, **everything),
        theirs(logits, seen, penalty=penalty, **everything),
        rtol=1e-5,
    )


@given(
    st.lists(st.integers(-4, 4), min_size=2, max_size=40),
    st.integers(0, 45),
    st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.0]),
    st.sampled_from([0.0, 0.1, 0.6]),
)
def test_with_ties_the_kept_set_is_as_large_and_as_likely(values, top_k, top_p, min_p):
    # Quarter steps: many exact ties. Which of several equal tokens survives is ours to choose (the lowest
    # ids); how many and how likely is not. Transformers' top-k keeps every tie of the k-th, so maybe more.
    logits = np.array(values, dtype=np.float32) / 4
    mine = ours(logits, top_k=top_k)
    distinct = np.unique(mine[mine > 0])
    k = min(top_k or len(logits), len(logits))
    assert np.count_nonzero(mine) == k
    order = np.lexsort((np.arange(len(logits)), -logits))[:k]
    assert set(np.flatnonzero(mine)) == set(order)
    assert len(distinct) == len(np.unique(logits[order]))
    # The later filters, on logits where only those k are left: what transformers makes of them.
    masked = np.full_like(logits, -np.inf)
    masked[order] = logits[order]
    a, b = ours(logits, top_k=top_k, top_p=top_p, min_p=min_p), theirs(masked, top_p=top_p, min_p=min_p)
    if abs(_slack(masked, top_p)) > 1e-9:  # else rounding decides which side of top_p a token falls on
        np.testing.assert_allclose(np.sort(a), np.sort(b), atol=1e-12)


def _slack(logits, top_p):
    """How near a partial sum of the sorted probabilities comes to top_p."""
    p = -np.sort(-torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy())
    return np.abs(np.cumsum(p) - top_p).min() if top_p < 1 else 1.0


def test_masked_logits_are_never_drawn():
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[3, 9]] = [1.0, 0.5]
    params = SamplingParams(top_k=40, top_p=1.0, min_p=0.0, temperature=2.0)
    assert {sample(logits, params, 1, i) for i in range(200)} == {3, 9}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_models_logits_are_refused(bad):
    logits = random_logits(1)
    logits[17] = bad
    for params in (SamplingParams(), SamplingParams(temperature=0, repeat_penalty=1.1)):
        with pytest.raises(CheckpointError, match="finite"):
            sample(logits, params, 0, 0)
    with pytest.raises(CheckpointError, match="finite"):
        sample(np.full(9, -np.inf, dtype=np.float32), SamplingParams(), 0, 0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_argmax(temperature):
    logits = random_logits(2)
    for min_p in (0.0, 0.05):
        params = SamplingParams(temperature=temperature, min_p=min_p)
        assert {sample(logits, params, 0, i) for i in range(20)} == {int(logits.argmax())}


def chi_square(counts, p):
    expected = counts.sum() * p
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("what", ["positions", "seeds"])
def test_draws_follow_the_distribution(what):
    logits = np.array([2.0, 1.0, 1.0, 0.0, -1.0, -30.0, 0.5, 1.5], dtype=np.float32)
    params = SamplingParams(**{**OFF, "temperature": 0.9, "top_k": 7})
    p = theirs(logits, temperature=0.9, top_k=7)
    n = 20_000
    draws = [
        sample(logits, params, 5, i) if what == "positions" else sample(logits, params, i, 5)
        for i in range(n)
    ]
    counts = np.bincount(draws, minlength=8)
    assert counts[5] == 0
    keep = p > 0
    # 6 degrees of freedom: 22.46 is passed by chance once in a thousand; the seeds are fixed.
    assert chi_square(counts[keep], p[keep]) < 22.46


def test_neighbouring_positions_are_independent():
    logits = np.zeros(4, dtype=np.float32)
    params = SamplingParams(**OFF)
    draws = np.array([sample(logits, params, 11, i) for i in range(20_001)])
    pairs = np.bincount(draws[:-1] * 4 + draws[1:], minlength=16)
    assert chi_square(pairs, np.full(16, 1 / 16)) < 37.7  # 15 degrees of freedom, 0.001
    other_seed = np.array([sample(logits, params, 12, i) for i in range(20_001)])
    pairs = np.bincount(draws * 4 + other_seed, minlength=16)
    assert chi_square(pairs, np.full(16, 1 / 16)) < 37.7


def test_noise_is_gumbel():
    x = np.sort(gumbel(3, 4, np.arange(100_000)))
    assert np.isfinite(x).all()
    cdf = np.exp(-np.exp(-x))
    # Kolmogorov-Smirnov distance, 0.001 level: 1.95 / sqrt(n).
    assert np.abs(cdf - (np.arange(len(x)) + 0.5) / len(x)).max() < 1.95 / math.sqrt(len(x))


def test_noise_depends_on_seed_position_and_id_only():
    ids = np.array([5, 900, 49151])
    noise = gumbel(1, 2, ids)
    np.testing.assert_array_equal(noise[::-1], gumbel(1, 2, ids[::-1]))
    np.testing.assert_array_equal(noise[1:2], gumbel(1, 2, np.array([900], dtype=np.int32)))
    for other in (gumbel(2, 2, ids), gumbel(1, 3, ids), gumbel(2, 1, ids)):
        assert not np.isin(other, noise).any()


@given(st.integers(0, 2**64), st.integers(0, 10_000), st.integers(0, 1000))
@settings(max_examples=50)
def test_same_seed_same_token_whatever_was_filtered_away(seed, position, logits_seed):
    # Log p differs between two filters by a constant only, so a token that wins without the filter still wins
    # among the survivors, if it is one of them.
    logits = random_logits(logits_seed, 60)
    wide, narrow = SamplingParams(**OFF), SamplingParams(**{**OFF, "top_k": 10})
    token = sample(logits, wide, seed, position)
    assert sample(logits.copy(), wide, seed, position) == token
    if token in candidates(logits, narrow)[0]:
        assert sample(logits, narrow, seed, position) == token


def test_temperature_zero_is_argmax_with_the_lowest_id_on_a_tie():
    logits = np.array([0.0, 5.0, 5.0, 1.0], dtype=np.float32)
    params = SamplingParams(temperature=0)
    assert params.greedy
    assert sample(logits, params, 0, 0) == 1
    penalized = SamplingParams(temperature=0, repeat_penalty=2.0)
    assert not penalized.greedy
    assert sample(logits, penalized, 0, 0, behind(penalized, logits, [1])) == 2
    with pytest.raises(UsageError):
        candidates(logits, params)


def test_penalty_leaves_the_callers_logits_alone():
    logits = random_logits(3)
    before = logits.copy()
    every = dict(repeat_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={3: 1})
    penalize(logits, behind(SamplingParams(**every), logits, [1, 2], [2]))
    np.testing.assert_array_equal(logits, before)


def test_penalties_are_those_of_the_api():
    # By hand: minus presence for what the answer has, minus frequency for each time; the prompt is free.
    logits = np.array([1.0, 2.0, 3.0, -1.0, 0.5], dtype=np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = penalize(logits, behind(params, logits, prompt=[0, 0, 4], answer=[1, 3, 3, 3]))
    np.testing.assert_array_equal(got, np.float32([1.0, 1.25, 3.0, -2.25, 0.5]))
    params = SamplingParams(presence_penalty=-2, frequency_penalty=-1)
    got = penalize(logits, behind(params, logits, prompt=[2], answer=[1, 1]))
    np.testing.assert_array_equal(got, np.float32([1.0, 6.0, 3.0, -1.0, 0.5]))


def test_a_bias_comes_before_the_penalties():
    # As vLLM and llama.cpp have it: 2 + 1 = 3 is halved, -1 - 1 = -2 is doubled, then the rest is taken away.
    logits = np.array([2.0, -1.0, 5.0], dtype=np.float32)
    params = SamplingParams(repeat_penalty=2, frequency_penalty=1, logit_bias={0: 1, "1": -1})
    got = penalize(logits, behind(params, logits, prompt=[0], answer=[1, 1]))
    np.testing.assert_array_equal(got, np.float32([1.5, -6.0, 5.0]))


def test_a_bias_bans_a_token_and_forces_one():
    logits = random_logits(4)
    best = int(logits.argmax())
    for temperature in (0.0, 1.0):
        banned = SamplingParams(**{**OFF, "temperature": temperature}, logit_bias={best: -100})
        forced = SamplingParams(**{**OFF, "temperature": temperature}, logit_bias={17: 100})
        assert best not in {sample(logits, banned, 1, i, behind(banned, logits)) for i in range(50)}
        assert {sample(logits, forced, 1, i, behind(forced, logits)) for i in range(50)} == {17}


def test_biases_are_taken_in_every_form_and_checked():
    expected = ((5, -100), (50256, 2.5))
    for form in ({50256: 2.5, 5: -100}, {"50256": 2.5, "5": -100}, ["5=-100", "50256=2.5"], expected):
        assert SamplingParams(logit_bias=form).logit_bias == expected
    assert hash(SamplingParams(logit_bias={1: 1})) == hash(SamplingParams(logit_bias=[[1, 1]]))
    with pytest.raises(UsageError, match="49,152"):
        check_bias(SamplingParams(logit_bias={49152: 1}), 49152)


def test_log_softmax_equals_torch_and_does_not_overflow():
    x = np.array([[1000.0, 999.0, -1000.0], [0.0, 1.0, 2.0]], dtype=np.float32)
    expected = torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(log_softmax(x), expected, rtol=1e-12)


def test_a_seed_is_chosen_afresh_unless_given():
    assert choose_seed(SamplingParams(seed=0)) == 0
    assert len({choose_seed(SamplingParams()) for _ in range(8)}) == 8


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-0.1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(temperature="hot"),
        dict(temperature=True),
        dict(temperature=None),
        dict(top_p=1.1),
        dict(top_p=-0.1),
        dict(top_p=math.nan),
        dict(min_p=2),
        dict(top_k=-1),
        dict(top_k=2.5),
        dict(top_k=math.nan),
        dict(repeat_penalty=0),
        dict(repeat_penalty=math.nan),
        dict(presence_penalty=2.1),
        dict(presence_penalty=math.nan),
        dict(frequency_penalty=-2.1),
        dict(frequency_penalty="1"),
        dict(logit_bias=5),
        dict(logit_bias="5=1"),
        dict(logit_bias=[5]),
        dict(logit_bias=["5"]),
        dict(logit_bias=["5=x"]),
        dict(logit_bias=["5=nan"]),
        dict(logit_bias={-1: 0}),
        dict(logit_bias={"x": 0}),
        dict(logit_bias={"-1": 0}),
        dict(logit_bias={"9" * 5000: 0}),
        dict(logit_bias={1: 101}),
        dict(logit_bias={1: -101}),
        dict(logit_bias={1: True}),
        dict(logit_bias={True: 1}),
        dict(logit_bias={1.5: 1}),
        dict(logit_bias={i: 0 for i in range(1025)}),
        dict(max_tokens=-1),
        dict(max_tokens=1.5),
        dict(max_tokens="9"),
        dict(max_tokens=True),
        dict(seed="x"),
        dict(seed=-1),
        dict(seed=0.5),
        dict(stop=""),
        dict(stop=["a", ""]),
        dict(stop=[1]),
        dict(stop=5),
        dict(stop=b"ab"),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_name(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_but_changes_what_is_given_and_refuses_unknown_names():
    params = SamplingParams(seed=3)
    assert params.but(top_k=2, seed=None) == dataclasses.replace(params, top_k=2)
    with pytest.raises(UsageError, match="topk"):
        params.but(topk=2)
    with pytest.raises(UsageError, match="top_k"):
        params.but(top_k=-2)
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize("k", [1, 40, 1024])
def test_the_largest_of_a_long_row_are_those_of_a_stable_sort(k):
    rng = np.random.default_rng(k)
    for n in (70000, 70001, 70031):
        smooth = rng.normal(0, 3, n).astype(np.float32)
        level = np.round(smooth)  # many that are equal, at the cut too
        few = np.where(rng.random(n) < 0.0005, level, -np.inf).astype(np.float32)
        for x in (smooth, level, few, np.sort(smooth), np.zeros(n, np.float32)):
            assert _order(x, k).tolist() == np.argsort(-x, kind="stable")[:k].tolist()
