"""Tokens chosen on the device, or from the few logits that it sends: the same as from whole rows."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import IDS, TABLE, cuda
from emulation import needs_device
from tiny import TinyCheckpoint, tiny_model

from tinychat.backends.interface import Step
from tinychat.engine.sampling import SamplingParams, total_temperature
from tinychat.engine.speculation.lookup import PromptLookup
from tinychat.engine.speculation.speculator import Speculator
from tinychat.kernels_cuda import head

pytestmark = needs_device


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_the_largest_logits_are_those_of_the_rows(rows):
    a, b = cuda(TinyCheckpoint(4)), cuda(TinyCheckpoint(4))
    a.step(Step.of(IDS[:30], 0, 0, TABLE, 30))
    b.step(Step.of(IDS[:30], 0, 0, TABLE, 30))
    step = Step.of(IDS[30 : 30 + rows], 30, 30, TABLE, 0)
    for _ in range(3):  # run, captured, replayed
        expected, got = a.step(step), b.step_largest(step, 0.7)
        assert len(got) == rows
        for row, largest in zip(expected, got, strict=True):
            order = np.lexsort((np.arange(258), -row))[: head.LARGEST]
            np.testing.assert_array_equal(largest.ids, order)
            np.testing.assert_array_equal(largest.values, row[order])
            np.testing.assert_array_equal(largest.whole(), row)
            x = row.astype(np.float64)
            assert largest.total == pytest.approx(np.exp((x - x.max()) / 0.7).sum(), rel=1e-5)
            assert largest.n == 258


def test_a_row_can_be_fetched_until_the_next_step():
    b = cuda(TinyCheckpoint(4))
    (first,) = b.step_largest(Step.of(IDS[:3], 0, 0, TABLE, 2), 0)
    assert first.total == 0
    assert b.step_largest(Step.of(IDS[3:4], 3, 3, TABLE, 1), 0) == []
    with pytest.raises(RuntimeError, match="another step"):
        first.whole()
    with pytest.raises(ValueError, match="65"):
        b.step_largest(Step.of(IDS[:65], 0, 0, TABLE, 0), 0)


SETTINGS = {
    "default": dict(),
    "nucleus": dict(top_k=0, top_p=0.9, min_p=0.0, temperature=0.6),
    "min-p": dict(top_k=0, top_p=1.0, min_p=0.1),
    "penalty": dict(repeat_penalty=1.2),
    "greedy with penalty": dict(temperature=0.0, repeat_penalty=1.2),
    "wide": dict(top_k=0, top_p=0.999, min_p=0.0, temperature=20.0),  # falls back to the row
    "all": dict(top_k=0, top_p=1.0, min_p=0.0),  # begins with the row
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_seed_gives_the_same_text_from_few_logits_as_from_all(setting, monkeypatch):
    options = dict(max_tokens=16, seed=5) | SETTINGS[setting]
    prompt = [int(t) for t in IDS[:20]] * 2  # so that prompt lookup finds drafts
    wanted: list[str] = []
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        inner = type(m.backend._steps).run
        monkeypatch.setattr(type(m.backend._steps), "run", lambda p, *a: wanted.append(a[4]) or inner(p, *a))

        def text():
            events = m.engine.generate(
                m.engine.branch(), prompt, SamplingParams(**options), speculator=Speculator(PromptLookup())
            )
            *_, done = events
            return done.completion.token_ids

        few = text()
        assert set(wanted) == {head.LOGITS if setting == "all" else head.TOP}
        wanted.clear()
        monkeypatch.setattr(type(m.backend), "step_largest", None)
        assert text() == few
        assert set(wanted) == {head.LOGITS}


def test_the_default_settings_copy_two_kilobytes_a_token(monkeypatch):
    copied = []
    with tiny_model(ctx=256, backend="cuda", vocab_size=258) as m:
        m.tokenizer.eos_ids = frozenset()
        inner = m.backend._device.download
        list(m.generate([1, 2, 3], max_tokens=4, seed=1, draft="none"))
        monkeypatch.setattr(
            m.backend._device, "download", lambda to, data: copied.append(to.nbytes) or inner(to, data)
        )
        list(m.generate([1, 2, 3], max_tokens=4, seed=1, draft="none"))
    assert copied == [4 * (2 * head.LARGEST + 2)] * 4


def test_the_totals_temperature_is_of_each_step():
    b = cuda(TinyCheckpoint(4))
    b.step(Step.of(IDS[:8], 0, 0, TABLE, 8))
    totals = []
    for temperature in (0.5, 1.0, 0.0, 2.0):
        (row,) = b.step_largest(Step.of(IDS[8:9], 8, 8, TABLE, 0), temperature)
        totals.append(row.total)
    assert totals[2] == 0
    assert 1 <= totals[0] < totals[1] < totals[3] < 258
    assert total_temperature(SamplingParams(top_k=0, temperature=2.0)) == 2.0
