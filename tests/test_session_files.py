"""Saved conversations: whole, foreign and damaged ones."""

from __future__ import annotations

import json

import pytest
from session_helpers import GREEDY, say
from tiny import tiny_folder, tiny_model

import tinychat
from tinychat.base.errors import TinychatError


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def model():
    with tiny_model(ctx=256) as m:
        yield m


def test_save_and_load(model, tmp_path):
    session = model.session(system="Sys", temperature=0.9, seed=3, max_tokens=8, stop=["zzz"])
    say(session, "wörld 👩‍👩‍👧")
    list(session.regenerate())
    say(session, "two")
    session.save(tmp_path / "deep" / "chat.json", memory=False)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["chat.json"]
    back = tinychat.Session.load(tmp_path / "deep" / "chat.json", model)
    assert (back.messages, back.system, back.params) == (session.messages, "Sys", session.params)
    assert (back.nodes, back.leaf) == (session.nodes, session.leaf)
    assert back.count_tokens() == session.count_tokens()
    assert say(back, "three").completion.token_ids == say(session, "three").completion.token_ids
    # In another process, so to speak: a model that has nothing cached.
    with tiny_model(ctx=256) as fresh:
        back = tinychat.Session.load(tmp_path / "deep" / "chat.json", fresh)
        assert say(back, "three").completion.token_ids == session.nodes[session.leaf].ids


def test_without_a_model_the_one_it_was_held_with_is_loaded(tmp_path):
    with tinychat.load(tiny_folder(tmp_path / "model"), device="cpu", threads=1) as model:
        session = model.session(**GREEDY)
        say(session, "hello")
        session.save(tmp_path / "chat.json")
    back = tinychat.Session.load(tmp_path / "chat.json")
    with back.model:
        assert (back.model.name, back.messages) == (str(tmp_path / "model"), session.messages)
        assert say(back, "again").completion.text


def test_another_models_ids_are_not_believed(model, tmp_path):
    session = model.session(**GREEDY)
    say(session, "one")
    session.save(tmp_path / "chat.json")
    with tiny_model(seed=1) as other:
        other.name = "other"
        back = tinychat.Session.load(tmp_path / "chat.json", other)
        assert back.messages == session.messages
        assert all(not n.ids for n in back.nodes)
        say(back, "two")


def test_a_message_with_half_a_surrogate_can_be_sent_and_saved(model, tmp_path):
    session = model.session(**GREEDY)
    say(session, "caf\udce9")
    session.save(tmp_path / "chat.json")
    say(tinychat.Session.load(tmp_path / "chat.json", model), "again")


def damaged(content):
    """Saved conversations with one thing wrong each."""
    node = content["nodes"][1]
    yield "not json"
    yield b"\xff\xfe\x00"
    yield ""
    yield "[]"
    yield "null"
    yield "[" * 100_000
    yield {}
    yield {**content, "tinychat_session": 99}
    for key in content:
        yield {k: v for k, v in content.items() if k != key}
    for changes in (
        dict(leaf=5),
        dict(leaf=-1),
        dict(leaf="x"),
        dict(leaf=0.5),
        dict(leaf=True),
        dict(nodes=5),
        dict(nodes=[5]),
        dict(params={"temperature": "hot"}),
        dict(params={"unknown": 1}),
        dict(params=None),
        dict(system=5),
        dict(model=None),
    ):
        yield {**content, **changes}
    for changes in (
        dict(role="wizard"),
        dict(role=None),
        dict(content=None),
        dict(parent=1),
        dict(parent=-1),
        dict(parent="0"),
        dict(ids=["a"]),
        dict(ids=[1.5]),
        dict(ids=None),
        dict(ids={"a": 1}),
        dict(prompt_ids=[None]),
        dict(prompt_text=5),
        dict(stats=[]),
        dict(unknown=1),
    ):
        yield {**content, "nodes": [content["nodes"][0], {**node, **changes}]}


def test_damaged_files_are_refused_in_two_lines(model, tmp_path):
    session = model.session(**GREEDY)
    say(session, "one")
    path = tmp_path / "chat.json"
    session.save(path)
    n = 0
    for bad in damaged(json.loads(path.read_text())):
        raw = bad if isinstance(bad, (str, bytes)) else json.dumps(bad)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        with pytest.raises(TinychatError) as e:
            tinychat.Session.load(path, model)
        assert str(path) in e.value.what
        assert "\n" not in e.value.what + e.value.todo
        n += 1
    assert n > 30


def test_ids_outside_the_vocabulary_never_reach_the_model(model, tmp_path):
    session = model.session(**GREEDY)
    say(session, "one")
    path = tmp_path / "chat.json"
    session.save(path)
    content = json.loads(path.read_text())
    for bad in (258, -1, 10**12):
        content["nodes"][1]["ids"] = [bad]
        path.write_text(json.dumps(content))
        back = tinychat.Session.load(path, model)
        assert back.messages == session.messages
        say(back, "two", max_tokens=2)


def test_files_that_cannot_be_read_or_written(model, tmp_path):
    with pytest.raises(TinychatError, match="nowhere"):
        tinychat.Session.load(tmp_path / "nowhere.json", model)
    with pytest.raises(TinychatError):
        tinychat.Session.load(tmp_path, model)
    (tmp_path / "file").write_text("")
    session = model.session(**GREEDY)
    with pytest.raises(TinychatError, match="write"):
        session.save(tmp_path / "file" / "chat.json")


def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch):
    import errno
    import os

    session = model.session(**GREEDY)
    path = tmp_path / "chat.json"
    session.save(path)
    before = path.read_bytes()
    say(session, "one")

    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TinychatError, match="No space"):
        session.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
