"""Drafts by EAGLE-3 heads: the text stays, and the head follows its branch."""

from __future__ import annotations

import numpy as np
import pytest
from drafted import answer, same_text
from families import relative_error
from heads import head_model, head_settings, head_tensors, save_head
from recurrent import looked_ahead
from tiny import tiny_folder

import tinychat
from tinychat import loading
from tinychat.backends.cpu import CpuBackend
from tinychat.backends.reference import ReferenceBackend
from tinychat.engine import kv_file
from tinychat.engine.speculation.further import FurtherLayer
from tinychat.hub.verify import verify


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.mktemp("home")
        m.setenv("TINYCHAT_HOME", str(folder))
        with head_model(folder / "head") as made:
            yield made


def test_the_text_is_the_same_and_drafts_are_accepted(model):
    drafted, accepted, evicted = same_text(model, 10)
    assert drafted > accepted > drafted / 4
    assert evicted > 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_two_hundred_prompts_have_the_same_text(kv_bits, tmp_path):
    with head_model(tmp_path / "head", kv_bits=kv_bits) as model:
        drafted, accepted, evicted = same_text(model, 200, kv_bits)
        assert drafted > accepted > drafted / 4
        assert evicted > 200


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_the_text_is_the_same_over_short_caches(kv_bits, tmp_path):
    with head_model(tmp_path / "head", kv_bits=kv_bits) as model:
        drafted, accepted, _ = same_text(model, 4, kv_bits)
        assert drafted > accepted > 0


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_its_guesses_are_the_references(kv_bits, tmp_path):
    ids, looked = np.random.default_rng(1).integers(0, 256, 70).tolist(), []
    for backend in (CpuBackend, ReferenceBackend):
        with head_model(tmp_path / backend.name, kv_bits=kv_bits, backend=backend) as model:
            branch = model.engine.branch()
            model.engine.run(branch, ids[:40], 40)
            model.engine.run(branch, ids[40:], 30)
            looked.append(looked_ahead(model, branch, [5, 6, 7]))
    some = np.isfinite(looked[1])
    assert some.sum() == 3 * 250
    assert relative_error(looked[0][some], looked[1][some]) < 0.01


def test_the_head_follows_its_branch(model):
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
    shorter = fork.truncate(60)
    engine.run(fork, ids[shorter:], len(ids) - shorter)
    np.testing.assert_array_equal(looked_ahead(model, fork, behind), expected)
    fork.keep()
    found = engine.branch()
    n = found.match(ids[:-1])
    assert n > 0
    engine.run(found, ids[n:], len(ids) - n)
    np.testing.assert_array_equal(looked_ahead(model, found, behind), expected)
    for branch in (fresh, cut, fork, found):
        branch.free()


def test_a_file_has_what_the_head_goes_on_from_and_belongs_to_this_head(model, tmp_path):
    ids, engine = list(range(70)), model.engine
    branch = engine.branch()
    engine.run(branch, ids, len(ids))
    expected = looked_ahead(model, branch, [3, 4])
    assert kv_file.save(tmp_path / "1.safetensors", model, branch)
    branch.free()
    assert kv_file.load(tmp_path / "1.safetensors", model, branch) == 70
    np.testing.assert_array_equal(looked_ahead(model, branch, [3, 4]), expected)
    branch.free()
    assert model.backend.describe()["head"].startswith("head:")


def test_nothing_is_guessed_behind_no_token(model):
    plain, _ = answer(model, [7], temperature=0.0)
    ours, stats = answer(model, [7], drafts=4, temperature=0.0)
    assert ours == plain
    assert stats.drafted_tokens > 0


def test_a_head_is_the_draft_that_its_name_names(model):
    assert model.speculator().drafter.name == "eagle3"
    assert model.speculator("auto").drafter.name == "eagle3"
    assert model.speculator("ngram").drafter.name == "ngram"
    assert "predicts further" in model.speculator("mtp").take_notice()
    assert isinstance(model.speculator().drafter, FurtherLayer)


def test_a_folder_is_recognized_by_its_config_and_one_for_another_model_is_left_out(tmp_path):
    tiny_folder(tmp_path / "model", n_layers=6, tie_embeddings=False)
    good, bad = head_settings(), head_settings(target_hidden_size=128)
    save_head(tmp_path / "head", good, head_tensors(good))
    save_head(tmp_path / "other", bad, head_tensors(head_settings()))
    assert verify(tmp_path / "head").bad_files == {}
    said = {}
    for name in ("head", "other"):
        draft = str(tmp_path / name)
        with tinychat.load(tmp_path / "model", device="cpu", draft=draft, ctx=128) as model:
            *_, done = model.session().send("hello", max_tokens=8, temperature=0)
            said[name] = done.completion.token_ids
            speculator = model.speculator()
            assert (speculator.drafter is not None) == (name == "head")
            notice = speculator.take_notice()
            assert ("hidden size" in notice) == (name == "other")
    assert said["head"] == said["other"]
    with tinychat.load(tmp_path / "model", device="cpu", draft="ngram", ctx=128) as model:
        later = model.speculator(str(tmp_path / "head"))
        assert later.drafter is None
        assert "drafts for another model" in later.take_notice()


def test_where_there_are_no_kernels_for_heads_it_is_said_and_the_model_runs(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "model", n_layers=6)
    save_head(tmp_path / "head", head_settings(), head_tensors(head_settings()))
    made = loading.make_backend
    monkeypatch.setattr(loading, "make_backend", lambda *given: made(*given[:3]))  # as the GPU's is made
    with tinychat.load(tmp_path / "model", device="cpu", draft=str(tmp_path / "head"), ctx=128) as model:
        speculator = model.speculator()
        assert speculator.drafter is None
        assert "the GPU has no kernels" in speculator.take_notice()
