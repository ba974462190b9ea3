"""Perplexity by hand on predictors whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinychat.base.errors import UsageError
from tinychat.perplexity import perplexity


def uniform(ids):
    return np.zeros((len(ids), 7), dtype=np.float32)


def successor(ids):
    """Gives id + 1 (of 50) a probability of 3/4 and shares out the rest."""
    out = np.full((len(ids), 50), math.log(0.25 / 49), dtype=np.float32)
    out[np.arange(len(ids)), (np.asarray(ids) + 1) % 50] = math.log(0.75)
    return out


def test_guessing_among_seven_is_seven():
    value, n = perplexity(uniform, [1] * 64, window=16)
    assert value == pytest.approx(7)
    assert n == 4 * 8


def test_each_token_is_scored_by_the_row_before_it():
    value, _ = perplexity(successor, list(range(48)), window=16)
    assert value == pytest.approx(4 / 3)
    # Every second scored token comes as a surprise.
    ids = [i // 2 for i in range(48)]
    value, n = perplexity(successor, ids, window=16)
    assert n == 24
    assert value == pytest.approx(math.exp(-(12 * math.log(0.75) + 12 * math.log(0.25 / 49)) / 24))


def test_windows_do_not_see_each_other_and_a_rest_is_left_out():
    asked = []

    def logits(ids):
        asked.append(list(ids))
        return uniform(ids)

    steps = []
    _, n = perplexity(logits, [i % 7 for i in range(50)], 16, lambda *p: steps.append(p))
    assert asked == [[i % 7 for i in range(s, s + 16)] for s in (0, 16, 32)]
    assert n == 24
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_short_text_is_one_window():
    assert perplexity(uniform, [1, 2, 3, 4, 5], 512) == (pytest.approx(7), 3)
    assert perplexity(uniform, [1, 2], 512) == (pytest.approx(7), 1)


@pytest.mark.parametrize("ids", [[], [1]])
def test_nothing_to_score_is_said(ids):
    with pytest.raises(UsageError, match=f"{len(ids)} tokens"):
        perplexity(uniform, ids)


def test_a_window_too_small_is_said():
    with pytest.raises(UsageError, match="window"):
        perplexity(uniform, [1] * 99, 3)
