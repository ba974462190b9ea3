"""Who a model is: only what was computed here is believed, and it is computed once."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from families import CASES, random_model
from family_gguf import write as write_gguf
from safetensors.numpy import load_file, save_file
from tiny import byte_tokenizer

from tinychat.backends import pack_store
from tinychat.backends.cpu_pack import CpuLayout
from tinychat.base import identity, locations
from tinychat.base.errors import CheckpointError
from tinychat.base.files import MappedFile
from tinychat.formats import open_checkpoint
from tinychat.formats.subset import LayerSubset
from tinychat.network.weight_policy import WeightPolicy


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A GGUF and a folder of the same random model."""
    root = tmp_path_factory.mktemp("sound")
    cls, changes = CASES["qwen3"]
    hf = random_model(cls, **changes)
    write_gguf(root / "model.gguf", hf, "qwen3")
    (root / "folder").mkdir()
    tensors = {k: t.detach().numpy().copy() for k, t in hf.state_dict().items()}
    if hf.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, root / "folder" / "model.safetensors")
    settings = hf.config.to_dict() | {"architectures": [cls]}
    (root / "folder" / "config.json").write_text(json.dumps(settings))
    byte_tokenizer().save(root / "folder")
    return root


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(identity, "SETTLED", 0.0)  # files made a moment ago are remembered too
    return tmp_path / "home"


@pytest.fixture(params=["model.gguf", "folder"])
def model(request, sound, tmp_path):
    """A copy that a test may change."""
    copy = tmp_path / "mine" / request.param
    copy.parent.mkdir()
    (shutil.copytree if request.param == "folder" else shutil.copyfile)(sound / request.param, copy)
    return copy


def name_of(path) -> str:
    return open_checkpoint(path).fingerprint()


def weights_of(path):
    return path / "model.safetensors" if path.is_dir() else path


def flip(path, at=-100):
    with path.open("r+b") as f:
        f.seek(at, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def test_a_manifest_beside_a_file_is_not_believed(sound, tmp_path):
    theirs = tmp_path / "stranger" / "model.gguf"
    theirs.parent.mkdir()
    shutil.copyfile(sound / "model.gguf", theirs)
    flip(theirs)
    mine = open_checkpoint(sound / "model.gguf")
    for digest in (mine.fingerprint(), mine.fingerprint().removeprefix("gguf:")):
        claim = {"file": "model.gguf", "size": theirs.stat().st_size, "sha256": digest, "name": "model"}
        (theirs.parent / "manifest.json").write_text(json.dumps(claim))
        assert name_of(theirs) != mine.fingerprint()


def test_the_same_content_is_the_same_model_wherever_it_lies(model, tmp_path):
    first = name_of(model)
    moved = tmp_path / "elsewhere" / model.name
    moved.parent.mkdir()
    model.rename(moved)
    assert name_of(moved) == first


def test_a_file_is_hashed_once(model, monkeypatch):
    first = name_of(model)
    monkeypatch.setattr(identity, "_piece", None)  # hashing again would fail
    assert name_of(model) == first


def test_a_file_written_in_place_and_given_its_old_time_is_another(model):
    weights, first = weights_of(model), name_of(model)
    before = weights.stat()
    flip(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert name_of(model) != first


def test_another_file_of_the_same_size_and_time_is_another(model):
    weights, first = weights_of(model), name_of(model)
    before = weights.stat()
    other = weights.with_name("other")
    shutil.copyfile(weights, other)
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, weights)
    assert name_of(model) != first


def test_a_link_that_leads_elsewhere_is_another(model, tmp_path):
    weights, blobs = weights_of(model), tmp_path / "blobs"
    blobs.mkdir()
    one, other = blobs / "one", blobs / "other"
    weights.rename(one)
    shutil.copyfile(one, other)
    flip(other)
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    weights.symlink_to(one)
    first = name_of(model)
    weights.unlink()
    weights.symlink_to(other)
    assert name_of(model) != first


def test_a_hash_is_not_remembered_of_a_file_that_was_just_written(model, home, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", 2.0)
    name_of(model)
    assert not locations.hashes_file().exists()


@pytest.mark.parametrize("memory", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_damaged_memory_costs_time_only(model, home, memory):
    first = name_of(model)
    locations.hashes_file().write_text(memory)
    assert name_of(model) == first
    assert json.loads(locations.hashes_file().read_text())


def test_a_file_that_changes_while_it_is_read_makes_no_pack(model, home):
    from tinychat.models import FAMILIES

    checkpoint = open_checkpoint(model)
    checkpoint.fingerprint()
    flip(weights_of(model))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        pack_store.opened(checkpoint, WeightPolicy(), FAMILIES[checkpoint.config.family], CpuLayout())
    assert not list((home / "packs").glob("*.pack"))


def test_what_decides_the_weights_of_a_folder_is_part_of_its_name(sound, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(sound / "folder", folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    other = {k: a + 1 for k, a in whole.items()}
    save_file(whole, folder / "a.safetensors")
    save_file(other, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    seen = set()
    for files in (["a"], ["b"], ["a", "b"]):
        names = [f"{f}.safetensors" for f in files]
        index.write_text(json.dumps({"weight_map": dict(zip("xy", names, strict=False))}))
        seen.add(name_of(folder))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 5e5}))
    seen.add(name_of(folder))
    assert len(seen) == 4


def test_some_layers_are_another_model_and_go_with_the_whole(sound):
    checkpoint = open_checkpoint(sound / "model.gguf")
    part = LayerSubset(checkpoint, [0])
    assert part.fingerprint() != checkpoint.fingerprint()
    for c in (checkpoint, part):
        path = pack_store.pack_path(c, WeightPolicy(), CpuLayout())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert len(locations.packs_of(checkpoint.fingerprint())) == 2


def test_a_large_file_says_that_it_is_read_and_pieces_do_not_change_the_hash(sound, monkeypatch):
    path, said = sound / "model.gguf", []
    monkeypatch.setattr(identity, "SAID", 1000)
    first = identity.content_hash(MappedFile(path), said.append)
    assert ["once" in s for s in said] == [True]
    locations.hashes_file().unlink()
    monkeypatch.setattr(identity, "BLOCK", 1000)
    assert identity.content_hash(MappedFile(path)) == first


def test_a_hash_is_that_of_size_and_pieces(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(identity, "PIECE", 4)
    path = tmp_path / "file"
    path.write_bytes(b"abcdefghij")
    parts = [hashlib.sha256(p).digest() for p in (b"abcd", b"efgh", b"ij")]
    expected = hashlib.sha256((10).to_bytes(8, "little") + b"".join(parts)).hexdigest()
    assert identity.content_hash(MappedFile(path)) == expected
    assert np.frombuffer(MappedFile(path).data, np.uint8).tobytes() == b"abcdefghij"
