"""Choosing from the largest logits alone gives what the whole row gives, bit for bit, or asks for the row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.backends.interface import LargestLogits
from tinychat.base.errors import CheckpointError
from tinychat.engine import sampling
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, candidates, largest_suffice, sample, total_temperature

N = 2000


class Row:
    """A row of logits, and what a backend says of it. `asked`: whether the row itself was wanted."""

    def __init__(self, x, k=256, off=0.0):
        self.x, self.k, self.off, self.asked = x.astype(np.float32), k, off, False

    def largest(self, params):
        order = np.lexsort((np.arange(len(self.x)), -self.x))[: self.k]
        total, temperature = 0.0, total_temperature(params)
        if temperature:
            x = self.x.astype(np.float64)
            total = np.exp((x - x.max()) / temperature).sum() * (1 + self.off * LargestLogits.TOTAL_WITHIN)
        return LargestLogits(order, self.x[order], len(self.x), float(total), self.whole)

    def whole(self):
        self.asked = True
        return self.x

    def same(self, params, seen=(), answer=()):
        """The row sorted whole, the row, and its largest give the same; whether the largest sufficed."""
        penalties = Penalties.of(params, self.x, [*seen, *answer], (), len(seen))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "FEW", 10**9)
            expected = candidates(self.x, params, penalties)
        for logits in (self.x, self.largest(params)):
            self.asked = False
            for got, want in zip(candidates(logits, params, penalties), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        for p in (params, params.but(temperature=0)):
            assert sample(self.largest(p), p, 3, 9, penalties) == sample(self.x, p, 3, 9, penalties)
        return not self.asked


def test_a_long_row_is_not_sorted_whole(monkeypatch):
    orders, inner = [], sampling._order
    monkeypatch.setattr(sampling, "_order", lambda x, k: orders.append(k) or inner(x, k))
    for params in (dict(top_p=0.9, min_p=0.0), dict(top_p=1.0), dict(repeat_penalty=1.2)):
        params, row = SamplingParams(top_k=0, **params), random_row(2).astype(np.float32)
        candidates(row, params, Penalties.of(params, row, np.arange(50), (), 0))
    assert orders == [sampling.FEW] * 3


def random_row(seed, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, N)


@pytest.mark.parametrize(
    "params",
    [
        dict(),
        dict(temperature=1.5),
        dict(top_k=256, top_p=1.0, min_p=0.0),
        dict(top_k=0, top_p=0.9, min_p=0.0),
        dict(top_k=0, top_p=0.9, min_p=0.1, temperature=1.3),
        dict(top_k=0, top_p=1.0, min_p=0.05),
        dict(top_k=1000, top_p=1.0, min_p=0.05),
        dict(top_k=N + 5, top_p=1.0, min_p=0.05),
        dict(repeat_penalty=1.3),
        dict(presence_penalty=0.4, frequency_penalty=0.3),
        dict(logit_bias={3: -100, 7: -1}),
        dict(temperature=1e-3, top_k=0),
        dict(temperature=0.0, repeat_penalty=1.2),
    ],
    ids=str,
)
def test_the_usual_settings_ask_for_no_whole_row(params):
    params, seen = SamplingParams(**params), np.arange(0, N, 7)
    assert largest_suffice(params)
    rows = [Row(random_row(seed)) for seed in range(20)]
    if params.temperature == 0:
        for row in rows:
            penalties = Penalties.of(params, row.x, seen, (), 0)
            of, whole = (sample(x, params, 0, 0, penalties) for x in (row.largest(params), row.x))
            assert of == whole
        assert not any(row.asked for row in rows)
    else:
        assert sum(row.same(params, seen, seen[:100]) for row in rows) >= 19


@pytest.mark.parametrize(
    "params",
    [
        dict(top_k=0, top_p=1.0, min_p=0.0),  # everything may be drawn
        dict(top_k=1000, top_p=0.9, min_p=0.0),  # of the 1000 largest, nobody knows the total
        dict(top_k=0, top_p=0.9, min_p=0.0, repeat_penalty=1.1),  # nor what the penalty makes of it
        dict(top_k=0, top_p=0.9999, min_p=0.0, temperature=3.0),  # a nucleus wider than what there is
        dict(top_k=40, repeat_penalty=0.5),  # others may rise
        dict(top_k=40, presence_penalty=-0.5),
        dict(top_k=40, frequency_penalty=-0.5),
        dict(top_k=40, logit_bias={7: 0.5}),
    ],
    ids=str,
)
def test_settings_that_need_it_ask_for_the_row(params):
    assert not Row(random_row(1)).same(SamplingParams(**params), np.arange(0, N, 7))


def test_whole_rows_are_asked_for_from_the_start_where_they_are_needed():
    for params in (dict(top_k=0, top_p=1.0, min_p=0.0), dict(repeat_penalty=0.9), dict(logit_bias={1: 1})):
        assert not largest_suffice(SamplingParams(**params))


def test_without_a_total_only_top_p_asks_for_the_row():
    row = Row(random_row(4))
    of = row.largest(SamplingParams())
    assert of.total == 0
    candidates(of, SamplingParams(top_k=0, top_p=1.0))
    assert not row.asked
    candidates(of, SamplingParams(top_k=0, top_p=0.9, min_p=0.0))
    assert row.asked


def test_none_of_the_largest_is_the_whole_row():
    row = Row(random_row(5), k=0)
    assert not row.same(SamplingParams())
    params = SamplingParams(temperature=0, repeat_penalty=1.5)
    penalties = Penalties.of(params, row.x, [1], (), 0)
    assert sample(row.largest(params), params, 0, 0, penalties) == sample(row.x, params, 0, 0, penalties)


def test_a_penalty_that_leads_to_a_tie_with_what_is_missing_asks_for_the_row():
    x = np.zeros(10)
    x[[9, 1, 5]] = 6, 3, 3
    params = SamplingParams(top_k=2, top_p=1.0, min_p=0.0, repeat_penalty=2.0)
    row = Row(x, k=2)  # 9 and 1; 9 falls to 3, behind 5, which is missing
    assert not row.same(params, np.array([9]))
    assert candidates(row.x, params, Penalties.of(params, row.x, [9], (), 0))[0].tolist() == [1, 5]


@pytest.mark.parametrize(("beside", "off"), [(5e-5, -1.0), (-5e-5, 1.0)])
def test_a_nucleus_that_the_totals_error_may_move_asks_for_the_row(beside, off):
    row = Row(random_row(6), off=off)
    odds = np.exp(np.sort(row.x.astype(np.float64))[::-1] - row.x.max())
    top_p = np.cumsum(odds)[20] / odds.sum() * (1 + beside)
    assert not row.same(SamplingParams(temperature=1.0, top_k=0, top_p=top_p, min_p=0.0))
    assert row.same(SamplingParams(temperature=1.0, top_k=0, top_p=top_p * 1.001, min_p=0.0))


@pytest.mark.parametrize("first", [np.nan, np.inf, -np.inf])
def test_a_damaged_models_logits_are_refused(first):
    of = LargestLogits(np.arange(2), np.array([first, -np.inf], np.float32), 9, 0.0, lambda: None)
    for temperature in (0.0, 0.7):
        with pytest.raises(CheckpointError, match="no finite logit"):
            sample(of, SamplingParams(temperature=temperature, repeat_penalty=1.1), 0, 0)


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([0, 1, 5, 16, 64, 400]),
    off=st.sampled_from([-1.0, 0.0, 1.0]),
    step=st.sampled_from([0.0, 0.25, 2.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 200, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 1.0, 1.05, 2.0, 0.8]),
    presence=st.sampled_from([0.0, 0.0, 0.5, 2.0, -1.0]),
    frequency=st.sampled_from([0.0, 0.0, 0.25, 2.0, -0.5]),
    bias=st.sampled_from([(), (), -100, -1.5, 2]),
    masked=st.booleans(),
)
def test_whatever_the_settings_both_ways_are_one(
    seed, k, off, step, temperature, top_k, top_p, min_p, penalty, presence, frequency, bias, masked
):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, 1300)
    if step:  # many exact ties
        x = np.round(x / step) * step
    if masked:
        x[rng.random(1300) < 0.9] = -np.inf
        x[0] = 1
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=penalty,
        presence_penalty=presence, frequency_penalty=frequency,
        logit_bias={} if bias == () else dict.fromkeys(np.argsort(-x)[:30:3].tolist(), bias),
    )  # fmt: skip
    Row(x, k, off).same(params, rng.integers(0, 1300, 60), rng.integers(0, 1300, 60))
