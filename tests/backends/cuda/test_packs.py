"""Weights packed for the device: read once, made again when damaged, kept in memory when the disk is full."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_steps import IDS, cuda, run
from emulation import needs_device
from tiny import TinyCheckpoint

from tinychat import packs
from tinychat.prepare import WeightPolicy

pytestmark = needs_device


class Unreadable(TinyCheckpoint):
    """A checkpoint whose weights must not be asked for."""

    def linear(self, name):
        raise AssertionError(f"{name} was read")

    vector = linear


def test_the_second_start_reads_the_pack_only(home):
    for policy in (WeightPolicy(), WeightPolicy("rtn")):
        first = run(cuda(TinyCheckpoint(1, tie_embeddings=False), policy), IDS, [9])
        again = run(cuda(Unreadable(1, tie_embeddings=False), policy), IDS, [9])
        np.testing.assert_array_equal(again, first)
    files = list((home / "packs").iterdir())
    assert len(files) == 2
    assert [packs.verify(f) for f in files] == [[], []]


def test_a_damaged_pack_is_made_again(home):
    expected = run(cuda(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    sound = file.read_bytes()
    file.write_bytes(sound[:-1000])
    np.testing.assert_array_equal(run(cuda(TinyCheckpoint(1)), IDS, [9]), expected)
    assert file.read_bytes() == sound


def test_a_full_disk_is_a_warning_and_the_model_answers(home, monkeypatch):
    expected = run(cuda(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    file.unlink()

    def full(self, a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packs._File, "put", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        got = run(cuda(TinyCheckpoint(1)), IDS, [9])
    np.testing.assert_array_equal(got, expected)
