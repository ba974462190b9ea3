"""Damage to a model on disk is found by `pull` and by `doctor --verify`, and said by name."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.numpy import save_file
from tiny_gguf import write

import tinychat
from tinychat.backends import pack_check
from tinychat.backends import pack_file as packs
from tinychat.base import identity
from tinychat.base.errors import CheckpointError
from tinychat.base.files import Stamp
from tinychat.cli.main import main
from tinychat.hub import store


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An alias `tiny` whose source is a file on this machine."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("TINYCHAT_HOME", str(home))
    monkeypatch.setattr(identity, "SETTLED", 0.0)
    write(tmp_path / "tiny.gguf")
    (home / "aliases.json").write_text(json.dumps({"tiny": f"file:{tmp_path / 'tiny.gguf'}"}))
    return home


def rot(path, at=-5):
    """Flip a bit and give the file its old time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path):
    os.truncate(path, path.stat().st_size - 1000)


def doctor(model, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        main(["doctor", "--verify", str(model)])
    return e.value.code, capsys.readouterr().out


@pytest.mark.parametrize("damage", [rot, cut, os.unlink])
def test_a_damaged_model_is_pulled_again(home, capsys, damage):
    path = store.pull("tiny")
    sound = path.read_bytes()
    damage(path)
    if path.exists():
        assert doctor("tiny", capsys)[0] == 1
    assert store.pull("tiny") == path
    assert path.read_bytes() == sound
    if damage is not os.unlink:
        assert "damaged on disk" in capsys.readouterr().err
    assert not list((home / "models").glob(".damaged/*"))


@pytest.mark.parametrize("damage", [rot, os.unlink])
def test_a_damaged_part_of_a_model_is_pulled_again(home, tmp_path, damage, capsys):
    write(tmp_path / "split.gguf", split=8)
    aliases = {"split": f"file:{tmp_path / 'split-00002-of-00003.gguf'}"}
    (home / "aliases.json").write_text(json.dumps(aliases))
    path = store.pull("split")
    assert path.name == "split-00001-of-00003.gguf"
    third = path.with_name("split-00003-of-00003.gguf")
    sound = third.read_bytes()
    damage(third)
    assert store.pull("split") == path
    assert third.read_bytes() == sound
    assert "split-00003-of-00003.gguf: " in capsys.readouterr().err
    assert store.remove("split") > 0
    assert store.installed() == []


def test_a_damaged_model_stays_where_it_cannot_be_pulled_again(home, tmp_path, monkeypatch, capsys):
    path = store.pull("tiny")
    rot(path)
    (tmp_path / "tiny.gguf").unlink()
    with pytest.raises(tinychat.base.errors.TinychatError):
        store.pull("tiny")
    assert path.exists()
    monkeypatch.setenv("TINYCHAT_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="damaged on disk"):
        store.pull("tiny")
    assert path.exists()


def test_doctor_reads_a_model_and_its_packs_and_removes_a_damaged_one(home, capsys):
    path = store.pull("tiny")
    tinychat.load("tiny", device="cpu").close()
    code, said = doctor("tiny", capsys)
    (pack,) = (home / "packs").glob("*.pack")
    assert code == 0
    assert f"{path.name}: whole" in said
    assert f"{pack.name}: whole" in said
    rot(pack, packs.PAGE + 64)
    code, said = doctor("tiny", capsys)
    assert code == 1
    assert "damaged in model.embed_tokens" in said
    assert not pack.exists()
    tinychat.load("tiny", device="cpu").close()
    assert pack_check.verify(pack) == []


def test_pull_does_not_call_a_model_ready_whose_pack_rotted(home, capsys):
    store.pull("tiny")
    tinychat.load("tiny", device="cpu").close()
    (pack,) = (home / "packs").glob("*.pack")
    rot(pack, packs.PAGE + 64)
    store.pull("tiny")
    assert "makes them again" in capsys.readouterr().err


def test_a_file_of_ones_own_is_compared_with_what_it_was(home, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine.gguf"
    shutil.copyfile(tmp_path / "tiny.gguf", mine)
    tinychat.load(str(mine), device="cpu").close()
    assert doctor(mine, capsys)[0] == 0
    # rot under the file system leaves every time as it was
    stamp = Stamp.of(mine)
    rot(mine)
    monkeypatch.setattr(Stamp, "of", lambda file: stamp)
    code, said = doctor(mine, capsys)
    assert code == 1
    assert "nobody wrote to it" in said
    assert "Get it again from where it came." in said
    assert "tinychat pull" not in said  # it gets no file of one's own


def test_a_model_whose_tokenizer_cannot_be_read_is_not_installed(home, tmp_path):
    import numpy as np

    folder = tmp_path / "broken"
    folder.mkdir()
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    found = store.verify(str(folder)) if (folder / "config.json").exists() else None
    assert found is None
    (folder / "config.json").write_text("{}")
    assert store.verify(str(folder)).bad_files
