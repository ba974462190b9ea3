"""The KV cache on disk: the same bits go on, and nothing that does not fit is believed."""

from __future__ import annotations

import errno
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from tinychat.base.errors import TinychatError
from tinychat.base.events import Notice
from tinychat.engine import kv_file
from tinychat.engine.eviction import EvictionPolicy

TEXT = np.random.default_rng(1).integers(0, 256, 700).tolist()


@pytest.fixture(params=["cpu", "reference"])
def model(request):
    with tiny_model(ctx=256, backend=request.param) as m:
        m.tokenizer.eos_ids = frozenset()
        yield m


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kv" / "1.safetensors"


def filled(model, n, policy=None):
    branch = model.engine.branch(policy)
    for i in range(0, n, 16):
        part = TEXT[i : min(i + 16, n)]
        model.engine.run(branch, part, len(part))
    return branch


@pytest.fixture(params=["cpu", "reference"])
def model4(request):
    with tiny_model(ctx=256, backend=request.param, kv_bits=4) as m:
        m.tokenizer.eos_ids = frozenset()
        yield m


@pytest.mark.parametrize("policy", [None, EvictionPolicy.of("h2o", 256), EvictionPolicy.of("h2o", 128)])
def test_what_was_saved_goes_on_with_the_same_bits(model, path, policy):
    goes_on(model, path, policy, 500 if policy and policy.budget == 128 else 200)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("n", [310, 560])
def test_a_window_that_is_far_from_the_beginning_is_saved_and_found(path, n, bits):
    windows = dict(n_layers=2, window=24, windowed_layers=(0,))
    with tiny_model(ctx=256, backend="cpu", kv_bits=bits, **windows) as model:
        goes_on(model, path, EvictionPolicy.of("h2o", 112), n, **windows)


@pytest.mark.parametrize("n", [192, 203])
@pytest.mark.parametrize("policy", [None, EvictionPolicy.of("h2o", 128)])
def test_what_was_saved_in_4_bits_goes_on_with_the_same_bits(model4, path, policy, n):
    goes_on(model4, path, policy, n)


def goes_on(model, path, policy, n, **options):
    options |= dict(ctx=256, backend=model.backend.name, kv_bits=model.backend.kv_bits)
    branch = filled(model, n, policy)
    assert kv_file.save(path, model, branch)
    evicted = branch.evicted
    model.engine.run(branch, [5], 0)  # what happens after the save is not in the file
    with tiny_model(**options) as again:
        other = again.engine.branch(policy)
        assert kv_file.load(path, again, other) == n
        assert (other.ids.tolist(), other.evicted) == (TEXT[:n], evicted)
        np.testing.assert_array_equal(again.engine.run(other, [5], 0), replay(options, n, policy))
        for token in TEXT[600:700]:  # and through later evictions
            ours, theirs = again.engine.run(other, [token], 0), model.engine.run(branch, [token], 0)
            np.testing.assert_array_equal(ours, theirs)
            if policy is None and len(branch) > 240:
                break


def replay(options, n, policy):
    """The logits of token 5 after the first n, computed in a fresh branch."""
    with tiny_model(**options) as fresh:
        return fresh.engine.run(filled(fresh, n, policy), [5], 0)


def test_the_file_is_the_owners_and_nothing_is_left_beside_it(model, path):
    kv_file.save(path, model, filled(model, 100))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == [path.name]


def test_little_is_not_kept_and_nothing_there_is_nothing(model, path):
    assert not kv_file.save(path, model, filled(model, 20))
    assert not path.exists()
    assert kv_file.load(path, model, model.engine.branch()) == 0


def test_another_models_cache_is_not_used_and_stays(model, path):
    kv_file.save(path, model, filled(model, 100))
    with tiny_model(ctx=256, seed=1, backend=model.backend.name) as other:
        branch = other.engine.branch()
        assert kv_file.load(path, other, branch) == 0
        assert len(branch) == 0
    assert path.is_file()


def test_a_cache_under_a_larger_budget_is_not_used(model, path):
    kv_file.save(path, model, filled(model, 500, EvictionPolicy.of("h2o", 192)))
    for policy in (None, EvictionPolicy.of("h2o", 128)):
        assert kv_file.load(path, model, model.engine.branch(policy)) == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("kv") / "1.safetensors"
    with tiny_model(ctx=256, backend="cpu") as m:
        kv_file.save(path, m, filled(m, 100))
        raw = bytearray(path.read_bytes())
        header = int.from_bytes(raw[:8], "little") + 8
        raw[data.draw(st.integers(header, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        branch = m.engine.branch()
        with pytest.raises(kv_file.DamagedKvError):
            kv_file.load(path, m, branch)
        assert len(branch) == 0
        assert path.with_suffix(".damaged").is_file()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_set_aside_and_leaves_an_empty_branch(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("kv") / "1.safetensors"
    with tiny_model(ctx=256, backend="cpu") as m:
        policy = EvictionPolicy.of("h2o", 128)
        kv_file.save(path, m, filled(m, 300, policy))
        raw = bytearray(path.read_bytes())
        header = int.from_bytes(raw[:8], "little") + 8
        kind = data.draw(st.sampled_from(["cut", "header", "ids"]))
        if kind == "cut":
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        elif kind == "header":
            raw[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
        else:
            at = raw.index(np.asarray(TEXT[:4], np.int32).tobytes())
            raw[at : at + 4] = np.int32(data.draw(st.sampled_from([-1, 258, 2**31 - 1]))).tobytes()
        path.write_bytes(raw)
        branch = m.engine.branch(policy)
        try:
            n = kv_file.load(path, m, branch)
        except kv_file.DamagedKvError:
            assert not path.exists()
            assert path.with_suffix(".damaged").is_file()
            n = 0
        # A changed identity is another model's file; a changed number of evicted tokens, another budget's.
        assert len(branch) == n
        assert n in (0, 300)
        free = m.engine.branch(policy)
        m.engine.run(free, TEXT[:100], 0)


def test_the_oldest_files_go_first(model, path):
    branch = filled(model, 200)
    size = None
    for i in range(4):
        p = path.with_name(f"{i}.safetensors")
        model.kv_disk_budget = 10**9 if size is None else int(2.5 * size)
        kv_file.save(p, model, branch)
        size = p.stat().st_size
        os.utime(p, (i, i))
    assert sorted(os.listdir(path.parent)) == ["2.safetensors", "3.safetensors"]
    model.kv_disk_budget = 100
    assert not kv_file.save(path, model, branch)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(model, path, monkeypatch):
    branch = filled(model, 100)
    kv_file.save(path, model, branch)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kv_file, "save_file", full)
    with pytest.raises(TinychatError, match="No space"):
        kv_file.save(path, model, branch)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_resumed_conversation_does_not_read_itself_again(model, path, tmp_path):
    first = model.session(draft="none", temperature=0, max_tokens=40)
    for text in ("hello there", "and then?"):
        list(first.send(text))
    assert first.save_kv(path)
    first.save(tmp_path / "chat.json")
    with tiny_model(ctx=256, backend=model.backend.name) as again:
        again.tokenizer.eos_ids = frozenset()
        from tinychat.session import Session

        resumed = Session.load(tmp_path / "chat.json", again)
        assert resumed.load_kv(path) > 100
        said, done = [], None
        for done in resumed.send("go on"):
            said.append(done.text)
    *_, expected = first.send("go on")
    assert done.stats.cached_tokens == expected.stats.cached_tokens > 100
    assert "".join(said) == expected.completion.text


def test_a_damaged_cache_is_said_with_the_next_answer(model, path):
    s = model.session(draft="none", temperature=0, max_tokens=40)
    list(s.send("hello there, how are you today?"))
    s.save_kv(path)
    path.write_bytes(path.read_bytes()[:-100])
    other = model.session(draft="none", temperature=0, max_tokens=5)
    assert other.load_kv(path) == 0
    notices = [e.message for e in other.send("hi") if isinstance(e, Notice)]
    assert len(notices) == 1
    assert "set aside as 1.damaged" in notices[0]
