"""The fuzz harness finds what it is for."""

from __future__ import annotations

import os
import signal

from fuzz import harness
from fuzz.harness import Case, run

from tinychat.base.errors import CheckpointError


def write(rng, folder):
    path = folder / "input"
    path.write_bytes(rng.bytes(8))
    return path


def refuses(path):
    raise CheckpointError("It is damaged.", "Pull it again.")


def fails(path):
    raise KeyError(path.name)


def one(check):
    report = run({"case": Case(write, check)}, seed=1, minutes=1, most_faults=1)
    assert len(report.faults) == 1
    return report.faults[0]


def test_exceptions_crashes_and_bugs_are_faults_that_name_seed_and_number():
    assert "KeyError: 'input'" in one(fails)
    assert "SIGTERM" in one(lambda path: os.kill(os.getpid(), signal.SIGTERM))
    fault = one(lambda path: (_ for _ in ()).throw(CheckpointError("No.", "This is a bug.")))
    assert "seed 1, number 0" in fault
    assert "bug" in fault


def test_memory_and_time_are_limited(monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.2)
    assert "MemoryError" in one(lambda path: bytearray(5 << 30))
    assert "more than 0.2 s" in one(lambda path: os.read(os.pipe()[0], 1))


def test_what_is_read_and_refused_is_counted_and_made_the_same_again(tmp_path):
    seen = run({"a": Case(write, lambda path: None), "b": Case(write, refuses)}, seed=7, minutes=0.05)
    assert not seen.faults
    assert min(seen.counts["a read"], seen.counts["b refused"]) > 0
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir(), second.mkdir()
    a = harness.again(Case(write, refuses), 7, 3, first).read_bytes()
    assert a == harness.again(Case(write, refuses), 7, 3, second).read_bytes()
