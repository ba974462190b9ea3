"""Models in several GGUF files, written by the gguf package: they say what the whole file says."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cli_helpers import in_process
from gguf import GGMLQuantizationType as Kind
from raw_gguf import Raw
from tiny_gguf import write

import tinychat
from tinychat.base.errors import CheckpointError
from tinychat.formats import open_checkpoint
from tinychat.formats.gguf_parts import model_of, names
from tinychat.hub import store

PARTS = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture
def parts(tmp_path):
    """The folder of a model in three parts."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "m.gguf", Kind.Q4_1, split=8)
    assert sorted(f.name for f in folder.iterdir()) == PARTS
    return folder


def changed(path, **fields) -> None:
    """Write a part again with other values of its `split.` fields."""
    raw = Raw(path)
    named = {f"split.{k.replace('_', '.')}": v for k, v in fields.items()}
    raw.fields = [(key, kind, named.get(key, value)) for key, kind, value in raw.fields]
    raw.write(path)


def test_any_part_and_the_folder_are_the_model_of_the_whole_file(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    truth = write(tmp_path / "whole.gguf", Kind.Q4_1)
    ids = list(range(0, 250, 5))
    with tinychat.load(tmp_path / "whole.gguf", device="cpu") as m:
        expected = m.logits(ids)
    for path in (parts / PARTS[0], parts / PARTS[2], parts):
        checkpoint = open_checkpoint(path)
        for name, weight in truth.items():
            np.testing.assert_array_equal(checkpoint.linear(name).dequantize(), weight)
        with tinychat.load(path, device="cpu") as m:
            np.testing.assert_array_equal(m.logits(ids), expected)


def test_all_parts_make_the_identity(parts):
    before = open_checkpoint(parts / PARTS[0]).fingerprint()
    assert open_checkpoint(parts / PARTS[1]).fingerprint() == before
    content = bytearray((parts / PARTS[2]).read_bytes())
    content[-1] ^= 1
    (parts / PARTS[2]).write_bytes(content)
    checkpoint = open_checkpoint(parts / PARTS[0])
    assert checkpoint.fingerprint() != before
    assert [f.path.name for f in checkpoint.weight_files()] == PARTS
    (parts / PARTS[1]).write_bytes((parts / PARTS[1]).read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*changed"):
        checkpoint.check_unchanged()


def test_a_part_says_its_model_and_the_others():
    assert names("a/b-00002-of-00003.gguf") == [f"a/b-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert model_of("a/b-00002-of-00003.gguf") == "a/b"
    assert names("b.gguf") == ["b.gguf"]
    assert model_of("b.gguf") is None


def test_show_counts_all_parts(parts, tmp_path):
    write(tmp_path / "whole.gguf", Kind.Q4_1)
    facts, whole = store.show(str(parts / PARTS[1])), store.show(str(tmp_path / "whole.gguf"))
    assert facts["parts"] == 3
    assert facts["size_bytes"] == sum((parts / name).stat().st_size for name in PARTS)
    assert facts["modules"] == whole["modules"]
    assert "parts" not in whole


@pytest.mark.parametrize("where", [PARTS[0], PARTS[2], ""])
def test_a_missing_part_is_named(parts, where):
    (parts / PARTS[1]).unlink()
    code, _, err = in_process("show", str(parts / where))
    assert code == 1
    assert len(err.strip().splitlines()) == 2
    assert f"{PARTS[1]} is missing" in err
    assert str(parts) in err.splitlines()[1]


def lost_names(parts):
    (parts / PARTS[0]).rename(parts / "m.gguf")
    return parts / "m.gguf"


def another_number(parts):
    changed(parts / PARTS[1], no=2)
    return parts / PARTS[0]


def another_count(parts):
    changed(parts / PARTS[1], count=4)
    return parts / PARTS[0]


def count_of_the_name(parts):
    changed(parts / PARTS[0], count=4)
    return parts / PARTS[0]


def another_model(parts):
    other = parts.parent / "other"
    other.mkdir()
    write(other / "m.gguf", Kind.Q4_1, split=8, change=lambda w: w.add_tensor("x", np.zeros(32, np.float32)))
    shutil.copyfile(other / PARTS[1], parts / PARTS[1])
    return parts / PARTS[0]


def another_architecture(parts):
    raw = Raw(parts / PARTS[1])
    raw.fields.append(("general.architecture", 8, "qwen2"))
    raw.write(parts / PARTS[1])
    return parts / PARTS[0]


def a_tensor_twice(parts):
    first, second = Raw(parts / PARTS[0]), Raw(parts / PARTS[1])
    second.tensors[0][0] = first.tensors[0][0]
    second.write(parts / PARTS[1])
    return parts / PARTS[0]


def a_tensor_less(parts):
    raw = Raw(parts / PARTS[2])
    raw.tensors.pop()
    raw.write(parts / PARTS[2])
    return parts / PARTS[0]


def no_numbers(parts):
    raw = Raw(parts / PARTS[2])
    raw.fields = [f for f in raw.fields if f[0] != "split.no"]
    raw.write(parts / PARTS[2])
    return parts / PARTS[0]


def words_for_numbers(parts):
    raw = Raw(parts / PARTS[0])
    raw.fields = [(k, *((8, "x") if k == "split.count" else (t, v))) for k, t, v in raw.fields]
    raw.write(parts / PARTS[0])
    return parts / PARTS[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost_names, r"part 1 of 3.*\n.*-00001-of-00003\.gguf"),
        (another_number, "00002-of-00003.*says that it is part 3 of 3"),
        (another_count, "00002-of-00003.*says that it is part 2 of 4"),
        (count_of_the_name, r"part 1 of 4.*\n.*-00001-of-00004\.gguf"),
        (another_model, "00002-of-00003.*another model than m-00001-of-00003"),
        (another_architecture, "00002-of-00003.*another model"),
        (a_tensor_twice, "00002-of-00003.*tensor 'token_embd.weight', which m-00001-of-00003.gguf has too"),
        (a_tensor_less, "have 19 tensors instead of 20"),
        (no_numbers, "split.no is no count"),
        (words_for_numbers, "split.count is no count"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_parts_that_do_not_belong_together_are_refused(parts, damage, said):
    path = damage(parts)
    with pytest.raises(CheckpointError, match=f"(?s){said}") as e:
        open_checkpoint(path)
    assert len(str(e.value).splitlines()) == 2
