"""Drafts by a model's own layer that predicts further: the text stays, and the layer follows its branch."""

from __future__ import annotations

import numpy as np
import pytest
from drafted import answer, same_text
from recurrent import FURTHER, RecurrentCheckpoint, delta_model, further_model, looked_ahead

from tinychat.base.load_options import LoadOptions
from tinychat.engine import kv_file
from tinychat.engine.speculation.control import Controller, _Mean
from tinychat.engine.speculation.further import FurtherLayer, few_suffice
from tinychat.engine.speculation.speculator import Speculator
from tinychat.network import further


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TINYCHAT_HOME", str(tmp_path_factory.mktemp("home")))
        with further_model(ctx=256) as made:
            yield made


def test_the_text_is_the_same_and_drafts_are_accepted(model):
    drafted, accepted, _ = same_text(model, 12)
    assert drafted > accepted > drafted / 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_two_hundred_prompts_have_the_same_text(kv_bits):
    with further_model(ctx=256, kv_bits=kv_bits) as model:
        drafted, accepted, evicted = same_text(model, 200, kv_bits)
        assert drafted > accepted > drafted / 4
        assert evicted > 200


def test_it_is_the_default_where_the_model_has_it(model):
    assert model.draft == "mtp"
    assert model.speculator().drafter.name == "mtp"
    assert model.speculator("auto").drafter.name == "mtp"
    with delta_model() as without:
        assert without.speculator().drafter.name == "ngram"
        asked = without.speculator("mtp")
        assert asked.drafter is None
        assert "predicts further" in asked.take_notice()


def test_the_layer_follows_its_branch(model):
    """Found prefixes, forks, drafts that were taken back and files leave what a fresh read leaves."""
    rng, engine = np.random.default_rng(5), model.engine
    ids = rng.integers(0, 256, 90).tolist()
    behind = rng.integers(0, 256, 5).tolist()
    fresh = engine.branch()
    engine.run(fresh, ids, len(ids))
    expected = looked_ahead(model, fresh, behind)
    np.testing.assert_array_equal(looked_ahead(model, fresh, behind), expected)  # it leaves nothing
    cut = engine.branch()
    for a, b in ((0, 33), (33, 34), (34, 70)):
        engine.run(cut, ids[a:b], b - a)
    engine.run(cut, [*ids[70:75], 1, 2, 3], 0, accept=lambda rows: 5)
    fork = cut.fork()
    for branch in (cut, fork):
        engine.run(branch, ids[75:], 15)
        np.testing.assert_array_equal(looked_ahead(model, branch, behind), expected)
    fork.keep()
    found = engine.branch()
    n = found.match(ids[:-1])
    assert n > 0
    engine.run(found, ids[n:], len(ids) - n)
    np.testing.assert_array_equal(looked_ahead(model, found, behind), expected)
    for branch in (fresh, cut, fork, found):
        branch.free()


def test_a_file_has_what_the_layer_goes_on_from_and_belongs_to_models_with_one(model, tmp_path):
    ids, engine = list(range(70)), model.engine
    branch = engine.branch()
    engine.run(branch, ids, len(ids))
    expected = looked_ahead(model, branch, [3, 4])
    assert kv_file.save(tmp_path / "1.safetensors", model, branch)
    branch.free()
    assert kv_file.load(tmp_path / "1.safetensors", model, branch) == 70
    np.testing.assert_array_equal(looked_ahead(model, branch, [3, 4]), expected)
    branch.free()
    with further_model(ctx=256) as plain:
        plain.backend.predicts = False
        assert plain.backend.describe() != model.backend.describe()


def test_without_room_there_are_no_drafts_and_the_same_text(model, monkeypatch):
    prompt, tries = list(range(30)), []
    plain, _ = answer(model, prompt, temperature=0.0)
    pool = model.engine.memories.pools[FurtherLayer(model.engine)._memory]

    def propose(drafter, *given):
        """Every other time somebody else holds what the layer needs."""
        tries.append(len(tries) % 2 and [pool.allocate() for _ in range(pool.available() - 1)])
        try:
            draft = real(drafter, *given)
        finally:
            for slot in tries[-1] or ():
                pool.release(slot)
        assert not (tries[-1] and draft.tokens)
        return draft

    real = FurtherLayer.propose
    monkeypatch.setattr(FurtherLayer, "propose", propose)
    ours, stats = answer(model, prompt, drafts=3, temperature=0.0)
    assert ours == plain
    assert stats.drafted_tokens > 0
    assert any(tries)


def test_a_model_that_is_loaded_for_another_drafter_is_the_same_without_the_layer(model):
    from tinychat.loading import make_backend

    checkpoint = RecurrentCheckpoint("qwen3_5", further=FURTHER, tie_embeddings=False)
    for draft, predicts in (("none", False), ("ngram", False), (None, True), ("mtp", True), ("auto", True)):
        options = LoadOptions(draft=draft, quantize="none", head_bits=16, threads=1)
        backend = make_backend(checkpoint, options)
        assert backend.predicts is predicts
        assert len(backend.memories) == 2 + predicts


def test_answers_in_company_are_not_kept_waiting_for_drafts(model):
    drafter = FurtherLayer(model.engine)
    speculator = Speculator(drafter, Controller(step_s={1: _Mean(1.0, 1.0)}))
    branch = model.engine.branch()
    model.engine.run(branch, [1, 2, 3], 3)
    drafter.begin([1, 2, 3, 4], branch)
    params = model.default_sampling.but(temperature=0.0)
    for company in (True, False):
        speculator.company = company
        assert bool(speculator.propose([1, 2, 3, 4], 9, params, 0).tokens) is not company
    branch.free()


def test_texts_of_rare_ids_are_drafted_for_with_the_whole_head():
    rare, common = further.FEW, further.FEW - 1
    assert few_suffice([common] * 128)
    assert few_suffice([common] * 120 + [rare] * 8)
    assert not few_suffice([common] * 110 + [rare] * 18)


def test_with_few_ids_the_text_is_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(further, "FEW", 64)
    with further_model(ctx=256) as model:
        monkeypatch.setattr("tinychat.engine.speculation.further.few_suffice", lambda ids: True)
        drafted, accepted, _ = same_text(model, 6)
    assert drafted > accepted > 0
