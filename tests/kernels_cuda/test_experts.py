"""experts.cu and routes.cu: a layer of experts, recorded as the backend records a model."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import bench, needs_device, needs_emulation
from expert_layers import EXPERTS, HIDDEN, TAKEN, layer, truth
from programs import FORMS

from tinychat.backends.cuda_pack import _joined, pack
from tinychat.backends.cuda_recorder import Recorder, Value
from tinychat.kernels_cuda import experts, linear
from tinychat.kernels_cuda.inputs import Size
from tinychat.kernels_cuda.program import Buffer, Program

pytestmark = needs_device

KINDS = [*FORMS, "fp32", "bf16", "mixed", "act-order", "mxfp4"]
ROWS = 40


def uploaded(names):
    """Linears that share an input, as the loader gives them."""
    return tuple(linear.upload(bench().modules, *p) for p in _joined([pack(w) for w in names]))


def run(weights, x, scores, *, normalize=True, residual=None):
    """float32 [rows, HIDDEN]."""
    b, rows = bench(), len(x)
    p = Program(b.modules, ROWS)
    r = Recorder(p, ())
    values, columns, out = p.floats(HIDDEN), p.floats(scores.shape[1]), p.floats(HIDDEN)
    p.record([values, columns, out], lambda z: None)  # what ops before this layer would write
    value = Value(HIDDEN, halves=p.halve(values, HIDDEN, None))
    routes = r.route(Value(scores.shape[1], floats=columns), min(TAKEN, scores.shape[1]), normalize)
    h = r.silu_mul(r.expert_linear(value, [uploaded(e[:2]) for e in weights], routes))
    r.expert_sum(
        r.expert_linear(h, [uploaded(e[2:]) for e in weights], routes), routes, Value(HIDDEN, floats=out)
    )
    p.records[-1].uses += [values, columns]
    place(p)
    b.device.upload(values.memory, x)
    b.device.upload(columns.memory, scores)
    b.device.upload(out.memory, np.zeros_like(x) if residual is None else residual)
    for record in p.records:
        record.launch(Size(rows))
    return b.get(out.memory, (rows, HIDDEN))


def place(p: Program) -> None:
    """`Program.build` for a program without a head; what a buffer held before is no number."""
    for buffer in {id(b): b for record in p.records for b in record.uses}.values():
        buffer.memory = bench().put(np.full(ROWS * buffer.row_bytes, 0xFF, np.uint8))


def halved(w, v):
    return v.astype(np.float16)


def crowd(rng, rows=ROWS):
    """Inputs and scores of rows of which half take the same experts."""
    x, scores = rng.normal(size=(rows, HIDDEN)), rng.normal(size=(rows, EXPERTS))
    scores[rows // 4 : 3 * rows // 4] = scores[0]
    return x.astype(np.float32), scores.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_they_should(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    weights = layer(rng, kind)
    x, scores = crowd(rng)
    want = truth(weights, x, scores, halved)
    assert np.linalg.norm(run(weights, x, scores) - want) < 1e-3 * np.linalg.norm(want)
    residual = rng.normal(size=(5, HIDDEN)).astype(np.float32)
    want = residual + truth(weights, x[:5], scores[:5], halved, normalize=False)
    got = run(weights, x[:5], scores[:5], normalize=False, residual=residual)
    assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    weights = layer(rng, kind)
    x, scores = crowd(rng)
    whole = run(weights, x, scores)
    for part in (slice(0, 1), slice(9, 10), slice(5, 21), slice(3, 20), slice(7, 40)):
        np.testing.assert_array_equal(run(weights, x[part], scores[part]), whole[part])


def test_experts_that_nobody_takes_are_not_read():
    """Their weights are made to be no numbers: nothing of them is to be seen."""
    rng = np.random.default_rng(2)
    weights = layer(rng, "fp32")
    x, scores = crowd(rng, 3)
    scores[:, 2], scores[:, 5] = -50, -60
    expected = run(weights, x, scores)
    for e in (2, 5):
        for w in weights[e]:
            w.weight[:] = np.nan
    np.testing.assert_array_equal(run(weights, x, scores), expected)
    scores[1, 5] = 50
    assert np.isnan(run(weights, x, scores)).any(axis=1).tolist() == [False, True, False]


def routed(scores, taken, normalize=True, bias=None, each=None, **rule):
    """(chosen, weights, pairs, work, routes), as the kernel leaves them."""
    b, (rows, n) = bench(), scores.shape
    p = Program(b.modules, rows)
    source = p.floats(n)
    rule = experts.Rule(normalize, bias=b.put(bias), each=b.put(each), **rule)
    r = experts.route(p, source, n, taken, rule)
    place_of: dict[str, Buffer] = dict(
        source=source, chosen=r.chosen, weights=r.weights, pairs=r.pairs, work=r.work
    )
    for buffer in place_of.values():
        buffer.memory = b.put(np.full(rows * buffer.row_bytes, 0xFF, np.uint8))
    b.device.upload(source.memory, scores)
    for record in p.records:
        record.launch(Size(rows))
    pairs = rows * taken
    chosen = b.get(r.chosen.memory, (rows, taken), np.int32)
    weights = b.get(r.weights.memory, (rows, taken))
    work = b.get(r.work.memory, (r.pieces(rows), 3), np.int32)
    return chosen, weights, b.get(r.pairs.memory, (pairs,), np.int32), work, r


@pytest.mark.parametrize(
    ("rows", "n", "taken"),
    [(1, 128, 8), (16, 128, 8), (40, 7, 3), (100, 1, 1), (64, 1024, 64), (130, 60, 33)],
)
def test_every_pair_is_some_blocks_work_once(rows, n, taken):
    rng = np.random.default_rng(n)
    scores = rng.normal(size=(rows, n)).astype(np.float32)
    scores[rows // 2 :] = np.round(scores[rows // 2 :])  # many are level
    chosen, weights, pairs, work, r = routed(scores, taken)
    p = np.exp(scores.astype(np.float64))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :taken]
    np.testing.assert_array_equal(chosen, order)
    p = np.take_along_axis(p, order, 1)
    np.testing.assert_allclose(weights, p / p.sum(1, keepdims=True), rtol=2e-6)
    assert sorted(pairs) == list(range(rows * taken))
    done = np.zeros(rows * taken, int)
    for e, first, end in work:
        if e < 0:
            continue
        assert 0 < end - first <= r.columns(rows)
        assert (chosen.reshape(-1)[pairs[first:end]] == e).all()
        done[pairs[first:end]] += 1
    assert (done == 1).all()


def test_shares_of_all_experts_where_they_are_not_normalized():
    scores = np.array([[3, 1, 2, -1], [-90, 0, 90, 89]], np.float32)
    chosen, weights, *_ = routed(scores, 2, normalize=False)
    p = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert chosen.tolist() == [[0, 2], [2, 3]]
    np.testing.assert_allclose(weights, np.take_along_axis(p, chosen, 1), rtol=2e-6)


RULES = {
    "sigmoid": dict(sigmoid=True),
    "sigmoid whole": dict(sigmoid=True, normalize=False, scale=2.5),
    "bias": dict(bias=True),
    "sigmoid bias": dict(sigmoid=True, bias=True),
    "each": dict(each=True, scale=0.5),
    "groups": dict(groups=(4, 2), normalize=False),
    "groups by two": dict(sigmoid=True, bias=True, groups=(6, 3), scale=2.5),
    "groups of one": dict(bias=True, groups=(48, 20)),
    "many groups": dict(groups=(24, 9)),
}


def chosen_by(scores, taken, normalize=True, sigmoid=False, bias=None, scale=1.0, each=None, groups=(1, 1)):
    """Experts and weights of one row of scores by what `Ops.route` says, in float64."""
    s = scores.astype(np.float64)
    weights = 1 / (1 + np.exp(-s)) if sigmoid else np.exp(s) / np.exp(s).sum()
    compared = weights if bias is None else weights + bias
    parts = np.split(compared, groups[0])
    sums = [np.sort(part)[::-1][: 1 if bias is None else 2].sum() for part in parts]
    for g in np.argsort(-np.array(sums), kind="stable")[groups[1] :]:
        compared = compared.copy()
        compared[g * len(parts[0]) : (g + 1) * len(parts[0])] = -np.inf
    experts = np.argsort(-compared, kind="stable")[:taken]
    w = weights[experts]
    w = w / (w.sum() + (1e-6 if sigmoid else 0)) if normalize else w
    return experts, w * scale * (1 if each is None else each[experts])


@pytest.mark.parametrize("name", RULES)
def test_routers_of_every_kind(name):
    rng, n, taken = np.random.default_rng(3), 48, 6
    rule = dict(RULES[name])
    for vector in ("bias", "each"):
        if rule.get(vector):
            rule[vector] = rng.normal(size=n).astype(np.float32)
    scores = rng.normal(size=(40, n)).astype(np.float32)
    chosen, weights, *_ = routed(scores, taken, **rule)
    for row, experts_, weights_ in zip(scores, chosen, weights, strict=True):
        expected = chosen_by(row, taken, **rule)
        assert experts_.tolist() == expected[0].tolist()
        np.testing.assert_allclose(weights_, expected[1], rtol=3e-6)
    few = [routed(scores[i : i + 1], taken, **rule)[1][0] for i in (0, 17)]
    np.testing.assert_array_equal(few, weights[[0, 17]])


def test_scores_that_are_no_numbers_stay_in_their_row():
    rng = np.random.default_rng(6)
    weights = layer(rng, "zeros")
    x, scores = crowd(rng, 6)
    clean = run(weights, x, scores)
    scores[1], scores[2, 3], scores[3, 1], scores[4] = np.nan, np.nan, np.inf, -np.inf
    got = run(weights, x, scores)
    np.testing.assert_array_equal(got[[0, 5]], clean[[0, 5]])
    assert not np.isfinite(got[1:5]).any()


@needs_emulation
@pytest.mark.parametrize("kind", ["zeros", "act-order"])
def test_warps_may_run_in_any_order(kind, monkeypatch):
    """No barrier is missing: with warps run from the last to the first, the bits are the same."""
    rng = np.random.default_rng(0)
    weights = layer(rng, kind)
    x, scores = crowd(rng, 20)
    expected = run(weights, x, scores)
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal(run(weights, x, scores), expected)
