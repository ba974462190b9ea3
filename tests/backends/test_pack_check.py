"""Rot in a pack is found: at load, or in the background where the pack is large; it is made again."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from backend_steps import IDS, cpu, run
from tiny import TinyCheckpoint

from tinychat.backends import pack_check
from tinychat.backends import pack_file as packs
from tinychat.base.errors import DamagedWeightsError
from tinychat.kernels_cpu import _native


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def large(monkeypatch, home):
    """The pack of a tiny model, which counts as a large one."""
    monkeypatch.setattr(packs, "SMALL", 1000)
    cpu(TinyCheckpoint(1))
    (pack,) = (home / "packs").glob("*.pack")
    return pack


def rot(path, at=packs.PAGE + 100):
    """Flip a bit as a disk would: nothing says that the file was written."""
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 64]))


def forget_when(path, days=30.0, done=0):
    """As if the pack had been written long ago, and nobody had touched it since."""
    pack_check.note(path, time.time() - days * 86400, done)


def wait_until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def test_every_bit_of_a_small_pack_is_checked_at_load(home):
    expected = run(cpu(TinyCheckpoint(1)), IDS, [9])
    (pack,) = (home / "packs").iterdir()
    for at in range(packs.PAGE, pack.stat().st_size, pack.stat().st_size // 7):
        rot(pack, at)
        sound = pack_check.verify(pack) == []  # between two parts nothing lies
        if sound:
            np.testing.assert_array_equal(run(cpu(TinyCheckpoint(1)), IDS, [9]), expected)
            continue
        with pytest.warns(RuntimeWarning, match="damaged .*made again"):
            np.testing.assert_array_equal(run(cpu(TinyCheckpoint(1)), IDS, [9]), expected)
        assert pack_check.verify(pack) == []


@pytest.mark.parametrize("put", ["copy", "link"])
def test_the_pack_of_other_weights_is_not_taken_whatever_it_is_called(home, put):
    expected = run(cpu(TinyCheckpoint(1)), IDS, [9])
    (pack,) = (home / "packs").glob("*.pack")
    run(cpu(TinyCheckpoint(2)), IDS, [9])
    (other,) = set((home / "packs").glob("*.pack")) - {pack}
    if put == "copy":
        pack.write_bytes(other.read_bytes())
    else:
        pack.unlink()
        pack.symlink_to(other)
    with pytest.warns(RuntimeWarning, match="made again"):
        np.testing.assert_array_equal(run(cpu(TinyCheckpoint(1)), IDS, [9]), expected)
    assert pack_check.verify(pack) == pack_check.verify(other) == []


def test_a_large_pack_that_somebody_wrote_to_is_checked_at_load(large):
    before = large.stat()
    rot(large)
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.warns(RuntimeWarning, match="made again"):
        cpu(TinyCheckpoint(1))
    assert pack_check.verify(large) == []


def test_rot_in_a_large_pack_is_found_in_the_background_and_ends_the_answer(large):
    rot(large)
    forget_when(large)
    backend = cpu(TinyCheckpoint(1))
    wait_until(lambda: backend._packs[0].damaged)
    assert not large.exists()
    with pytest.raises(DamagedWeightsError, match="embed_tokens"):
        run(backend, IDS, [9])
    run(cpu(TinyCheckpoint(1)), IDS, [9])  # made again
    assert pack_check.verify(large) == []


def test_a_sound_large_pack_is_checked_once_in_a_while_and_goes_on_where_it_was(large, monkeypatch):
    checked = []
    bad_parts = packs.Pack.bad_parts

    def watching(self, first=0, last=None):
        checked.append(first)
        return bad_parts(self, first, last)

    monkeypatch.setattr(packs.Pack, "bad_parts", watching)
    cpu(TinyCheckpoint(1))
    assert not checked  # it was written a moment ago
    forget_when(large, done=3)
    cpu(TinyCheckpoint(1))
    wait_until(lambda: pack_check._noted(large)[2] == 0)
    assert checked[0] == 3
    assert pack_check._noted(large)[1] > time.time() - 3600


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 1003])
def test_the_checksum_changes_with_every_bit(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    sums = {_native.checksum(data)}
    for at in range(size):
        for bit in (1, 16, 128):
            data[at] ^= bit
            sums.add(_native.checksum(data))
            data[at] ^= bit
    longer = np.append(data, np.zeros(1, np.uint8))
    assert len(sums | {_native.checksum(longer)}) == 3 * size + 2
