"""logits.cu under emulation: the argmax and the largest of a row, against a sort of all of it."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import bench, needs_device, needs_emulation

from tinychat.kernels_cuda import head

pytestmark = needs_device

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def argmax(x):
    b, rows = bench(), len(x)
    to = b.put(np.zeros(rows, np.int32))
    b.run("logits.cu", "argmax", (rows,), 1024, b.put(x), to, x.shape[1])
    return b.get(to, rows, np.int32)


def largest(x, inverse_temperature=0.0):
    """Ids, values and total of each row."""
    b, (rows, n) = bench(), x.shape
    columns = head.columns(head.TOP, n)
    to = b.put(np.full((rows, columns), -7, np.int32))
    factors = b.put(np.broadcast_to(np.float32(inverse_temperature), rows))
    b.run("logits.cu", "largest", (rows,), 1024, factors, b.put(x), to, n)
    got = b.get(to, (rows, columns), np.int32)
    counts, totals = got[:, -2], got[:, -1].view(np.float32)
    values = got[:, head.LARGEST :].view(np.float32)
    return [(g[:k], v[:k], t) for g, v, k, t in zip(got, values, counts, totals, strict=True)]


def test_argmax_is_the_first_of_the_largest_or_none_where_one_is_no_finite_number():
    x = floats(6, 5000)
    x[1, [7, 4000, 3]] = 9
    x[2] = -np.inf
    x[3] = 0
    x[4, ::2] = np.nan
    x[5, 4999] = 50
    np.testing.assert_array_equal(argmax(x), [x[0].argmax(), 3, -1, 0, -1, 4999])
    for bad, at in ((np.nan, 0), (np.nan, 4999), (np.inf, 17)):
        x[0] = 1
        x[0, at] = bad
        assert argmax(x)[0] == -1


ROWS = {
    "random": lambda n: floats(n) * 4,
    "all alike": lambda n: np.full(n, -1.5, np.float32),
    "many ties": lambda n: RNG.integers(-3, 3, n).astype(np.float32),
    "zeros of both signs": lambda n: np.where(RNG.random(n) < 0.5, -0.0, 0.0).astype(np.float32),
    "masked": lambda n: np.where(RNG.random(n) < 0.99, -np.inf, floats(n)).astype(np.float32),
    "nearly equal": lambda n: np.float32(1e30) * (1 + RNG.integers(0, 3, n).astype(np.float32) * 1e-7),
    "falling": lambda n: np.linspace(30, -30, n, dtype=np.float32),
    "rising": lambda n: np.linspace(-30, 30, n, dtype=np.float32),
}


@pytest.mark.parametrize("n", [1, 40, 256, 258, 1024, 5003])
def test_the_largest_are_those_that_a_sort_puts_first(n):
    x = np.stack([row(n) for row in ROWS.values()])
    for (ids, values, total), row in zip(largest(x), x, strict=True):
        order = np.lexsort((np.arange(n), -row))[: head.LARGEST]
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, row[order])
        assert total == 0


def test_a_nan_is_first_so_that_it_is_seen():
    x = floats(2, 3000)
    x[0, 2999] = np.nan
    x[1, 5], x[1, 6] = -np.nan, np.inf
    for (ids, values, _), first in zip(largest(x), (2999, 5), strict=True):
        assert ids[0] == first
        assert np.isnan(values[0])
        assert not np.isnan(values[1:]).any()


def test_large_logits_in_one_threads_way_are_given_up():
    x = floats(2, 1024 * 8)
    for thread in range(head.LARGEST - 1):
        x[0, thread::1024] += 100  # 255 · 8 of them are better than the best of the 256th thread
    (ids, values, _), (other, _, _) = largest(x)
    assert len(ids) == len(values) == 0
    assert len(other) == head.LARGEST


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("n", [258, 20_000])
def test_the_total_is_that_of_the_whole_row(n, temperature):
    x = floats(3, n) * 4
    x[1] = 7
    x[2, 10:] = -np.inf
    expected = np.exp((x.astype(np.float64) - x.max(axis=1, keepdims=True)) / temperature).sum(axis=1)
    got = [total for _, _, total in largest(x, 1 / temperature)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # a tenth of what sampling allows for


@needs_emulation
def test_warps_in_another_order_change_nothing(monkeypatch):
    x = floats(1, 5000)
    first = largest(x, 1.0)[0]
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    for a, b in zip(largest(x, 1.0)[0], first, strict=True):
        np.testing.assert_array_equal(a, b)
