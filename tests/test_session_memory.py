"""The KV cache beside a saved conversation: it saves time, and nothing else depends on it."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from session_helpers import say
from tiny import tiny_model

from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.events import Notice
from tinychat.engine import kv_file
from tinychat.session import Session


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model():
    with tiny_model(ctx=256, backend="cpu") as m:
        yield m


@pytest.fixture
def path(tmp_path):
    return tmp_path / "here" / "chat.json"


def held(model, path, **settings):
    session = model.session(temperature=0, max_tokens=20, **settings)
    for text in ("x" * 60, "and then?"):
        say(session, text)
    session.save(path)
    return session


def go_on(path, **changes):
    """(notices, tokens that were cached, the answer) in another process, so to speak."""
    with tiny_model(ctx=256, backend="cpu", **changes) as fresh:
        session = Session.load(path, fresh)
        *events, done = session.send("go on")
        notices = [e.message for e in events if isinstance(e, Notice)]
        return notices, done.stats.cached_tokens, done.completion.token_ids


def expected(session):
    *_, done = session.send("go on")
    return done.completion.token_ids


def test_a_loaded_conversation_goes_on_at_once(model, path):
    session = held(model, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["chat.json", "chat.json.kv"]
    assert stat.S_IMODE(kv_file.beside(path).stat().st_mode) == 0o600
    notices, cached, ids = go_on(path)
    assert (notices, ids) == ([], expected(session))
    assert cached > 120


def test_a_thinned_out_conversation_goes_on_as_it_was(model, path):
    session = model.session(temperature=0, max_tokens=40, kv_budget=176)
    model.kv_budget = 176
    for i in range(4):
        say(session, f"{i} " * 30)
    assert session._branch.evicted
    session.save(path)
    back = Session.load(path, model)
    assert back._branch.evicted == session._branch.evicted
    assert expected(back) == expected(session)


def rewritten(path, change):
    with safe_open(path, "numpy") as f:
        about, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, about)


def poisoned(about, tensors):
    tensors["memory0"] = np.roll(tensors["memory0"], 1, axis=0)
    about["crc32"] = kv_file.checksum(tensors)  # as the store would have it


def more_given_up(about, tensors):
    about["evicted"] = "16"


DAMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
    "noise": lambda p: p.write_bytes(os.urandom(5000)),
    "a bit": lambda p: p.write_bytes(p.read_bytes()[:-1000] + b"\x55" + p.read_bytes()[-999:]),
    "a stranger's": lambda p: rewritten(p, poisoned),
    "without a seal": lambda p: rewritten(p, lambda about, _: about.pop("seal")),
    "other facts": lambda p: rewritten(p, more_given_up),
    "other names": lambda p: rewritten(p, lambda _, tensors: tensors.pop("memory0")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_cache_is_said_and_not_used(model, path, damage):
    session = held(model, path)
    damage(kv_file.beside(path))
    left = sorted(p.name for p in path.parent.iterdir())
    notices, cached, ids = go_on(path)
    assert ids == expected(session)
    assert cached == 0
    assert len(notices) == 1
    assert "chat.json.kv" in notices[0]
    assert sorted(p.name for p in path.parent.iterdir()) == left  # the folder is the user's


def test_what_was_sealed_under_another_home_is_a_strangers(model, path, home, monkeypatch):
    session = held(model, path)
    monkeypatch.setenv("TINYCHAT_HOME", str(home / "other"))
    notices, cached, ids = go_on(path)
    assert (len(notices), cached, ids) == (1, 0, expected(session))


def test_a_damaged_secret_is_made_anew(model, path, home):
    held(model, path)
    (home / "memory.key").write_bytes(b"short")
    session = held(model, path)
    assert go_on(path)[1:] == (go_on(path)[1], expected(session))
    assert go_on(path)[1] > 120


@pytest.mark.parametrize("odd", ["folder", "pipe", "link to nothing"])
def test_an_odd_file_in_its_place_is_left_alone(model, path, odd):
    session = held(model, path)
    kv = kv_file.beside(path)
    kv.unlink()
    {"folder": kv.mkdir, "pipe": lambda: os.mkfifo(kv), "link to nothing": lambda: kv.symlink_to("nothing")}[
        odd
    ]()
    assert go_on(path) == ([], 0, expected(session))
    session.save(path)  # and saving works whatever is there
    assert json.loads(path.read_text())["leaf"] == session.leaf


def test_the_conversation_is_complete_without_it(model, path):
    session = held(model, path)
    kv_file.beside(path).unlink()
    assert go_on(path) == ([], 0, expected(session))


def test_another_models_cache_is_not_used(model, path):
    held(model, path)
    notices, cached, _ = go_on(path, seed=1)
    assert (notices, cached) == ([], 0)


def test_an_older_cache_gives_what_still_holds(model, path):
    session = held(model, path)
    old = kv_file.beside(path).read_bytes()
    list(session.edit(2, "something else"))
    session.save(path)
    kv_file.beside(path).write_bytes(old)
    notices, cached, ids = go_on(path)
    assert (notices, ids) == ([], expected(session))
    assert 60 < cached < 120


def test_it_is_bounded_and_can_be_left_out(model, path):
    held(model, path).save(path.with_name("without.json"), memory=False)
    model.kv_disk_budget = 1000
    mine = path.with_name("mine.safetensors")  # in the store, the oldest would go
    mine.write_bytes(b"x" * 5000)
    held(model, path.with_name("large.json"))
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "chat.json", "chat.json.kv", "large.json", "mine.safetensors", "without.json",
    ]  # fmt: skip
    with pytest.raises(UsageError):
        model.session().save(path, memory="no")


def test_where_it_cannot_be_written_the_conversation_is_saved_all_the_same(model, path, home, monkeypatch):
    (home / "file").write_text("no folder")
    monkeypatch.setenv("TINYCHAT_HOME", str(home / "file"))
    session = held(model, path)
    monkeypatch.setenv("TINYCHAT_HOME", str(home))
    assert [p.name for p in path.parent.iterdir()] == ["chat.json"]
    assert go_on(path) == ([], 0, expected(session))


def test_a_closed_model_saves_the_conversation_and_leaves_the_memory_of_before(path):
    with tiny_model(ctx=256, backend="cpu") as m:
        session = held(m, path)
        size = kv_file.beside(path).stat().st_size
    session.save(path)
    assert kv_file.beside(path).stat().st_size == size
    assert Session.load(path, m).messages == session.messages
    with tiny_model(ctx=256, backend="cpu") as m:
        *events, done = Session.load(path, m).send("more")
        assert done.stats.cached_tokens > 0
        assert not any(isinstance(e, Notice) for e in events)


def test_a_name_may_be_as_long_as_the_system_allows(model, tmp_path):
    path = tmp_path / ("ü" * 125 + ".json")
    session = held(model, path)
    assert Session.load(path, model).messages == session.messages
    with pytest.raises(TinychatError) as e:
        session.save(tmp_path / ("n" * 300))
    assert e.value.todo == "Give a shorter name."
