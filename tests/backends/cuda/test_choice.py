"""Which device a model is loaded on, and what is said about it."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import IDS
from emulation import needs_device
from tiny import tiny_folder

import tinychat
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.engine import kv_file

pytestmark = needs_device


def test_auto_waits_until_the_engine_has_been_run_on_a_gpu(machine_with_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("tinychat.loading.AUTO_GPU", False)
    with tinychat.load(tiny_folder(tmp_path / "tiny"), device="auto") as m:
        assert m.describe()["backend"] == "cpu"


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
