"""A home of its own for every test, and a machine that has the GPU of these tests."""

from __future__ import annotations

import pytest
from emulation import bench

from tinychat.backends.cuda_record import Record, key_of


@pytest.fixture(autouse=True)
def process():
    """`process()`: from now on it is as if another process used the device, which may have been lost."""

    def another() -> None:
        bench().device.lost = None

    bench().device.synchronize()  # what earlier tests gave up is free
    yield another
    another()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def machine_with_gpu(monkeypatch, home):
    """`open_modules` finds the device of these tests, which has passed its self-check, or raises what it is
    told to.
    """
    found = {"error": None, "modules": None}

    def open_modules(tell=None):
        if found["error"]:
            raise found["error"]
        modules = found["modules"] or bench().modules
        modules.tell = tell
        return modules

    monkeypatch.setattr("tinychat.backends.cuda_device.open_modules", open_modules)
    monkeypatch.setattr("tinychat.loading.has_gpu", lambda: True)
    Record(key_of(bench().modules), True).store()
    return found


@pytest.fixture
def small_memory(monkeypatch):
    """Allocations as small as tiny models' weights, and little room to work in: filling that takes time."""
    from tinychat import fitting, model
    from tinychat.backends import cuda_model, cuda_pack

    monkeypatch.setattr(cuda_pack, "PIECE", 1024)
    monkeypatch.setattr(cuda_model, "WORKSPACE", 1 << 20)
    monkeypatch.setattr(fitting, "HEADROOM", 1 << 20)
    monkeypatch.setattr(model, "HEADROOM", 1 << 20)
