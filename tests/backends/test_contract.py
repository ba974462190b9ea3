"""What every backend with kernels keeps to: rows, blocks, rollbacks and packs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from backend_steps import IDS, TABLE, cpu, cuda, run
from emulation import needs_device
from tiny import TinyCheckpoint

from tinychat.backends import pack_check
from tinychat.backends import pack_file as packs
from tinychat.backends.interface import Step
from tinychat.network.weight_policy import WeightPolicy


@pytest.fixture(params=[cpu, pytest.param(cuda, marks=needs_device)], ids=["cpu", "cuda"])
def backend(request):
    """`backend(checkpoint, policy)`: one of the kind."""
    return request.param


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_greedy_is_the_argmax(backend):
    checkpoint, cuts = TinyCheckpoint(6), [80, 1, 5, 20]
    logits = run(backend(checkpoint), IDS, cuts)
    np.testing.assert_array_equal(run(backend(checkpoint), IDS, cuts, greedy=True), logits.argmax(axis=1))


def test_only_the_asked_rows_get_logits(backend):
    b = backend(TinyCheckpoint(7))
    full = b.step(Step.of(IDS[:20], 0, 0, TABLE, 0))
    np.testing.assert_array_equal(b.step(Step.of(IDS[:20], 0, 0, TABLE, 17)), full[17:])
    assert b.step(Step.of(IDS[:20], 0, 0, TABLE, 20)).shape == (0, 258)
    np.testing.assert_array_equal(b.step(Step.of(IDS[:9], 0, 0, TABLE, 7)), full[7:9])


def test_a_rejected_row_leaves_no_trace(backend):
    b, c = backend(TinyCheckpoint(8)), backend(TinyCheckpoint(8))
    b.step(Step.of(IDS[:30], 0, 0, TABLE, 30))
    c.step(Step.of(IDS[:30], 0, 0, TABLE, 30))
    c.step(Step.of(IDS[100:105], 30, 30, TABLE, 5))  # a draft that is then rolled back
    step = Step.of(IDS[30:33], 30, 30, TABLE, 0)
    np.testing.assert_array_equal(c.step(step), b.step(step))


def test_a_copied_block_holds_what_the_first_held(backend):
    b = backend(TinyCheckpoint(9))
    b.step(Step.of(IDS[:20], 0, 0, TABLE, 20))
    expected = b.step(Step.of(IDS[20:21], 20, 20, TABLE, 0))
    other = TABLE.copy()
    other[1] = TABLE[5]
    b.copy_block(int(TABLE[1]), int(other[1]))
    np.testing.assert_array_equal(b.step(Step.of(IDS[20:21], 20, 20, other, 0)), expected)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_saved_blocks_can_be_put_elsewhere(backend, kv_bits):
    b = backend(TinyCheckpoint(9), kv_bits=kv_bits)
    b.step(Step.of(IDS[:40], 0, 0, TABLE, 40))
    step = Step.of(IDS[40:41], 40, 40, TABLE, 0)
    expected, saved = b.step(step), b.read_blocks(TABLE[:3])
    assert saved.shape == (3, b.kv_bytes_per_block())
    other = backend(TinyCheckpoint(9), kv_bits=kv_bits)
    table = TABLE[::-1].copy()
    other.write_blocks(table[:3], saved)
    np.testing.assert_array_equal(other.step(Step.of(IDS[40:41], 40, 40, table, 0)), expected)


class Unreadable(TinyCheckpoint):
    """A checkpoint whose weights must not be asked for."""

    def linear(self, name):
        raise AssertionError(f"{name} was read")

    vector = linear


def test_the_second_start_reads_the_pack_only(backend, home):
    for policy in (WeightPolicy(), WeightPolicy("rtn")):
        first = run(backend(TinyCheckpoint(1, tie_embeddings=False), policy), IDS, [9])
        again = run(backend(Unreadable(1, tie_embeddings=False), policy), IDS, [9])
        np.testing.assert_array_equal(again, first)
    files = list((home / "packs").iterdir())
    assert len(files) == 2
    assert [pack_check.verify(f) for f in files] == [[], []]


def damage_header(b):
    b[0] ^= 1


def damage_index(b):
    b[-5] ^= 1


def cut_short(b):
    del b[-1000:]


def empty(b):
    b.clear()


def flip_a_weight(b):
    b[packs.PAGE + 100] ^= 0x40


def flip_a_norm(b):
    index = json.loads(bytes(b[slice(*index_of(b))]))
    b[index["vectors"]["model.norm"][0] + 3] ^= 0x40


def index_of(b):
    *_, at, length, _ = packs.HEADER.unpack(b[: packs.HEADER.size])
    return at, at + length


@pytest.mark.filterwarnings("ignore:The stored weights were damaged")
@pytest.mark.parametrize(
    "damage", [damage_header, damage_index, cut_short, empty, flip_a_weight, flip_a_norm]
)
def test_a_damaged_pack_is_made_again(backend, home, damage):
    expected = run(backend(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    sound = file.read_bytes()
    bytes_ = bytearray(sound)
    damage(bytes_)
    file.write_bytes(bytes_)
    np.testing.assert_array_equal(run(backend(TinyCheckpoint(1)), IDS, [9]), expected)
    assert file.read_bytes() == sound


def test_a_full_disk_is_a_warning_and_the_model_answers(backend, home, monkeypatch):
    expected = run(backend(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    file.unlink()

    def full(self, a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packs.FileSink, "put", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        got = run(backend(TinyCheckpoint(1)), IDS, [9])
    np.testing.assert_array_equal(got, expected)
    assert list((home / "packs").iterdir()) == []
