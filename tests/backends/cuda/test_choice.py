"""Which device a model is loaded on, and what is said about it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from backend_steps import IDS
from emulation import bench, needs_device
from tiny import tiny_folder

import tinychat
from tinychat.backends import cuda_proof
from tinychat.backends.cuda_record import Record, key_of, stored
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.engine import kv_file

pytestmark = needs_device


@pytest.fixture
def checks(monkeypatch):
    """`checks(passed, trials)`: what the next self-checks come to; those that were made."""
    made = []

    def come_to(passed, trials=(), key=None):
        def run(tell=None):
            made.append(passed)
            record = Record(key or key_of(bench().modules), passed, trials=dict(trials))
            record.store()
            return record

        monkeypatch.setattr(cuda_proof, "run", run)
        return made

    return come_to


def backend_of(folder):
    with tinychat.load(folder, device="auto") as m:
        assert list(m.generate("a", max_tokens=2, temperature=0.0))
        return m.describe()["backend"]


def test_auto_has_the_gpu_checked_once_and_takes_it(machine_with_gpu, home, checks, tmp_path):
    (home / "gpu-check.json").unlink()
    made, folder = checks(True), tiny_folder(tmp_path / "tiny")
    assert [backend_of(folder), backend_of(folder)] == ["cuda", "cuda"]
    assert made == [True]


@pytest.mark.parametrize("what", ["stamp", "key"])
def test_another_driver_gpu_or_compiler_is_checked_again(machine_with_gpu, home, checks, tmp_path, what):
    record = stored()
    setattr(record, what, "another")
    record.store()
    made, folder = checks(True), tiny_folder(tmp_path / "tiny")
    assert backend_of(folder) == "cuda"
    assert made == [True]


def test_a_gpu_that_failed_stays_unused_and_is_named_each_time(machine_with_gpu, home, checks, tmp_path):
    (home / "gpu-check.json").unlink()
    made = checks(False, {"linears of q4_0": 0.1, "graphs, 8-bit cache": "the process ended (-6)"})
    folder = tiny_folder(tmp_path / "tiny")
    for _ in range(2):
        with pytest.warns(RuntimeWarning) as said:
            assert backend_of(folder) == "cpu"
        (line,) = (str(w.message) for w in said if w.category is RuntimeWarning)
        assert re.fullmatch(r"The CPU is used: .* failed its self-check \(graphs, 8-bit cache\)\.", line)
    assert made == [False]
    with tinychat.load(folder, device="cuda") as m:  # who asks for it has it
        assert m.describe()["backend"] == "cuda"


def test_a_check_that_cannot_be_made_or_kept_leaves_the_cpu(machine_with_gpu, home, tmp_path, monkeypatch):
    (home / "gpu-check.json").unlink()
    folder = tiny_folder(tmp_path / "tiny")

    def refused(tell=None):
        raise UsageError("No compiler was found.", "Install one.")

    monkeypatch.setattr(cuda_proof, "run", refused)
    with pytest.warns(RuntimeWarning, match="The CPU is used: No compiler was found"):
        assert backend_of(folder) == "cpu"


def test_auto_takes_the_gpu_and_a_chat_is_kept_with_its_cache(machine_with_gpu, tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    with tinychat.load(folder, device="auto", draft="none") as m:
        assert m.describe()["backend"] == "cuda"
        branch = m.engine.branch()
        m.engine.run(branch, [int(t) for t in IDS[:200]], 200)
        assert kv_file.save(tmp_path / "kv", m, branch)
        with tinychat.load(folder, device="cuda") as again:
            other = again.engine.branch()
            assert kv_file.load(tmp_path / "kv", again, other) == 200
            np.testing.assert_array_equal(again.engine.run(other, [7], 0), m.engine.run(branch, [7], 0))


def test_auto_falls_back_to_the_cpu_and_says_why(machine_with_gpu, tmp_path):
    machine_with_gpu["error"] = UsageError("The GPU is from 2010.", "Use --device cpu.")
    folder = tiny_folder(tmp_path / "tiny")
    with pytest.warns(RuntimeWarning, match="CPU is used: The GPU is from 2010"):
        m = tinychat.load(folder, device="auto")
    assert m.describe()["backend"] == "cpu"
    m.close()
    with pytest.raises(UsageError, match="2010"):
        tinychat.load(folder, device="cuda")


def test_a_model_that_the_gpu_has_no_room_for_is_refused_before_it_is_read(
    machine_with_gpu, tmp_path, monkeypatch
):
    monkeypatch.setattr("tinychat.backends.cuda_device.free_memory", lambda device: 200_000_000)
    folder = tiny_folder(tmp_path / "tiny")
    with pytest.raises(MemoryBudgetError, match="200 MB are free"):
        tinychat.load(folder, device="cuda")
    with pytest.warns(RuntimeWarning, match="CPU is used"), tinychat.load(folder) as m:
        assert m.describe()["backend"] == "cpu"
