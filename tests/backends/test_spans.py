"""Steps of several sequences: what each gets is what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest
import span_schedules
from backend_steps import TABLE
from families import CASES, FromTransformers, random_model
from memories import allocate
from recurrent import RecurrentCheckpoint
from tiny import TinyCheckpoint

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import Slots, Span, Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.kernels_cpu import _native
from tinychat.network.weight_policy import WeightPolicy


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.delenv("TINYCHAT_ISA", raising=False)
    return tmp_path


def windows(**changes):
    return TinyCheckpoint(2, n_layers=3, window=37, windowed_layers=(0, 2), context_length=512, **changes)


def experts():
    name, changes = CASES["mixtral window"]
    return FromTransformers(random_model(name, **changes))


MODELS = {
    "plain": (lambda: TinyCheckpoint(1, context_length=512), {}),
    "8-bit KV": (lambda: TinyCheckpoint(1, context_length=512), dict(kv_bits=8)),
    "windows": (lambda: windows(attn_soft_cap=2.0, logit_soft_cap=3.0), {}),
    "windows, 8-bit KV": (windows, dict(kv_bits=8, act_bits=16)),
    "4-bit KV": (lambda: TinyCheckpoint(1, context_length=512), dict(kv_bits=4)),
    "windows, 4-bit KV": (lambda: windows(attn_soft_cap=2.0), dict(kv_bits=4, act_bits=16)),
    "experts": (experts, {}),
    "convolutions": (lambda: RecurrentCheckpoint("lfm2"), {}),
    "state spaces": (lambda: RecurrentCheckpoint("granitemoehybrid"), {}),
    "delta rules, 4-bit KV": (lambda: RecurrentCheckpoint("qwen3_5"), dict(kv_bits=4)),
}


def cpu(model: str, threads: int = 2) -> CpuBackend:
    make, options = MODELS[model]
    b = CpuBackend(make(), WeightPolicy("rtn"), threads=threads, **options)
    allocate(b, span_schedules.BLOCKS)
    return b


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("model", MODELS)
def test_spans_together_give_the_bits_of_each_alone(model, isa, monkeypatch):
    monkeypatch.setenv("TINYCHAT_ISA", isa)
    one, many = cpu(model, threads=1), cpu(model, threads=3)
    for seed, n in enumerate((2, 4, 8) if isa == _native.isas()[0] else (8,)):
        apart = span_schedules.run(one, seed, n, together=False)
        span_schedules.assert_same(span_schedules.run(many, seed, n, together=True), apart)
    greedy = span_schedules.run(many, seed, n, together=True, greedy=True)
    for ids, logits in zip(greedy[0], apart[0], strict=True):
        for a, b in zip(ids, logits, strict=True):
            np.testing.assert_array_equal(a, b.argmax(axis=1))


@pytest.mark.parametrize("model", ["plain", "windows", "windows, 4-bit KV"])
def test_the_reference_takes_several_spans(model):
    policy, bits = WeightPolicy("none", 16), MODELS[model][1].get("kv_bits", 32)
    b = ReferenceBackend(MODELS[model][0](), policy, kv_bits=bits)
    allocate(b, span_schedules.BLOCKS)
    apart = span_schedules.run(b, 1, 4, together=False)
    span_schedules.assert_same(span_schedules.run(b, 1, 4, together=True), apart, rtol=1e-3, atol=1e-3)
    fast = CpuBackend(MODELS[model][0](), policy, act_bits=16, kv_bits=min(bits, 16))
    allocate(fast, span_schedules.BLOCKS)
    span_schedules.assert_same(span_schedules.run(fast, 1, 4, together=True), apart, rtol=0.05, atol=0.05)


def test_every_span_is_checked():
    b = cpu("plain")

    def span(ids=(1, 2), position=0, logits_from=2, table=TABLE[:1], length=0, scores=None, scored=0):
        slots = Slots(np.array(table, np.int32), length, scores, scored)
        return Span(np.array(ids, np.int32), position, logits_from, (slots,))

    good = span(table=[3])
    outside = np.array([span_schedules.BLOCKS], np.int32)
    for wrong, words in [
        (span(ids=[1, 258]), "vocabulary"),
        (span(ids=[-1, 2]), "vocabulary"),
        (span(ids=[], logits_from=0), "tokens"),
        (span(position=-1), "negative"),
        (span(length=-1), "negative"),
        (span(logits_from=3), "logits_from|negative"),
        (span(length=15), "cover"),
        (span(table=outside), "pool"),
        (span(table=[-1]), "pool"),
        (span(scores=np.zeros((1, 2, 2, 1), np.float32), scored=1), "scores"),
        (span(scores=np.zeros((2, 2, 2, 2), np.float64), scored=2), "scores"),
        (span(scores=np.zeros((3, 2, 2, 2), np.float32), scored=3), "scored"),
        (Span(np.zeros(1, np.int32), 0, 1, ()), "each memory"),
    ]:
        for spans in [(wrong,), (good, wrong), (wrong, good)]:
            with pytest.raises(ValueError, match=words):
                b.step(Step(spans))
    long = span(ids=np.zeros(300), logits_from=300, table=np.arange(20))
    for spans in [(), (long, long)]:  # no row, and more than max_rows in all
        with pytest.raises(ValueError, match="tokens"):
            b.step(Step(spans))
    assert b.step(Step((good, good))).shape == (0, 258)
