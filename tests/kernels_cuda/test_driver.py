"""What the device owes the driver: memory that copies may still use, its own context, errors that last."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from emulation import bench, cache, controls, driver, needs_emulation

from tinychat.backends import cuda_device
from tinychat.base.errors import DeviceLostError
from tinychat.kernels_cuda import driver as cuda_driver
from tinychat.kernels_cuda.driver import Device, DeviceError, DeviceMissingError, LostError, OutOfMemoryError
from tinychat.kernels_cuda.modules import Modules

pytestmark = needs_emulation


@pytest.fixture
def device():
    d = Device(driver())
    yield d
    controls().fake_lose(0)
    controls().fake_device(12060, 1, 86, 8 << 30)
    d.close()


@pytest.fixture
def called():
    """`called()`: what has been asked of the driver since the last time."""
    gc.collect()  # what earlier tests left is freed by other devices
    controls().fake_listen(True)

    def since() -> list[str]:
        said = controls().fake_said().decode().split()
        controls().fake_listen(True)
        return said

    yield since
    controls().fake_listen(False)


def test_memory_given_up_while_something_runs_is_freed_when_that_has_ended(device, called):
    memory, pinned = device.allocate(1000), device.pinned((10,), np.int32)
    device.clear(memory)
    called()
    del memory, pinned
    gc.collect()
    assert called() == []
    device.synchronize()
    said = called()
    assert said[0] == "cuStreamSynchronize"
    assert sorted(said[1:]) == ["cuMemFreeHost", "cuMemFree_v2"]


def test_memory_that_nothing_can_be_using_is_freed_at_once(device, called):
    memory = device.allocate(1000)
    called()
    del memory
    assert "cuMemFree_v2" in called()


def test_an_allocation_that_finds_no_room_waits_for_what_is_given_up(device):
    before = controls().fake_used()
    controls().fake_device(12060, 1, 86, before + 1500)
    memory = device.allocate(1000)
    device.clear(memory)
    with pytest.raises(OutOfMemoryError):
        device.allocate(1000)
    del memory
    assert device.allocate(1000).size == 1000


def test_an_array_is_kept_until_its_copy_has_ended(device):
    memory = device.allocate(4000)
    array = np.arange(1000, dtype=np.int32)
    count = [array]
    del array
    before = len(gc.get_referrers(count[0]))
    device.upload(memory, count[0])
    assert len(gc.get_referrers(count[0])) == before + 1
    device.synchronize()
    assert len(gc.get_referrers(count[0])) == before


def test_many_copies_do_not_keep_more_than_they_may(device, called, monkeypatch):
    monkeypatch.setattr(cuda_driver, "HELD", 10_000)
    memory = device.allocate(4000)
    called()
    for _ in range(20):
        device.upload(memory, np.zeros(1000, np.float32))
    assert 5 <= called().count("cuStreamSynchronize") <= 7


@pytest.mark.parametrize("what", ["memory", "graph"])
def test_freeing_leaves_another_librarys_device_current(device, what):
    held = [device.allocate(100)]
    if what == "graph":
        memory = held.pop()
        held.append(device.capture(lambda: device.clear(memory)))
    device.synchronize()
    controls().fake_be_current(0x1234)
    held.clear()
    gc.collect()
    assert controls().fake_current() == 0x1234
    device.enter()


@pytest.mark.parametrize("code", [700, 715, 719, 999])
def test_after_an_error_that_lasts_the_driver_is_not_asked_again(device, called, code):
    held = [device.allocate(100)]
    controls().fake_fail(b"cuMemsetD8Async", code)
    with pytest.raises(LostError):
        device.clear(held[0])
    called()
    for call in (
        lambda: device.allocate(100),
        device.synchronize,
        device.enter,
        lambda: device.clear(held[0]),
    ):
        with pytest.raises(LostError, match="cuMemsetD8Async"):
            call()
    held.clear()
    gc.collect()
    assert called() == []


@pytest.mark.parametrize("code", [1, 2, 701])
def test_after_another_error_it_goes_on(device, code):
    memory = device.allocate(100)
    controls().fake_fail(b"cuMemsetD8Async", code)
    with pytest.raises(DeviceError):
        device.clear(memory)
    device.clear(memory)


def test_a_device_that_was_lost_is_not_opened_again_in_the_same_process(device):
    cuda_device._opened[driver()] = Modules(device, cache())
    try:
        controls().fake_fail(b"cuMemsetD8Async", 719)
        with pytest.raises(LostError):
            device.clear(device.allocate(100))
        with pytest.raises(DeviceLostError, match="failed earlier in this process") as e:
            cuda_device.open_modules(driver())
        assert "--device cpu" in e.value.todo
    finally:
        del cuda_device._opened[driver()]


def test_room_is_left_for_graphs_and_for_each_threads_local_memory(device):
    free, _ = device.memory()
    assert device.room == (64 << 20) + 4 * 1536 * 512  # 4 processors of 1,536 threads
    assert cuda_device.free_memory(device) == free - device.room


def test_a_driver_that_the_loader_does_not_know_is_found_where_it_lies(tmp_path, monkeypatch):
    lib = tmp_path / "wsl" / "lib"
    lib.mkdir(parents=True)
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libtinychat-emulated-cuda.so.1")
    monkeypatch.setattr(cuda_driver, "PLACES", (str(tmp_path / "nowhere"), str(tmp_path / "w*" / "lib")))
    with pytest.raises(DeviceMissingError, match="No NVIDIA driver"):
        Device("libtinychat-emulated-cuda.so.1")
    (lib / "libtinychat-emulated-cuda.so.1").symlink_to(driver())
    found = Device("libtinychat-emulated-cuda.so.1")
    assert found.name == "Emulated GPU"
    found.close()


def test_a_module_that_the_driver_refuses_leaves_the_next_compiler(tmp_path, monkeypatch):
    """Of a compiler newer than the driver, which it knows by the PTX that it makes."""
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))

    class Newer:
        name, title = "newer 13.5", "newer"

        def target(self, capability):
            return "host"

        def compile(self, *arguments):
            return b"nonsense", ""

    tried = []

    def compilers(version):
        for compiler in (Newer(), cache().compiler):
            tried.append(compiler.name)
            yield compiler

    monkeypatch.setattr(cuda_device, "compilers", compilers)
    monkeypatch.setattr(cuda_device, "Cache", lambda folder, compiler: Copies(tmp_path, compiler))
    opened = cuda_device._compiled(bench().device, None)
    assert opened.cache.compiler.name == tried[1]
    assert len(tried) == 2


class Copies(type(cache())):
    """A cache that takes from the tests' one what that has."""

    def image(self, source, defines, target):
        kept = cache()
        if self.compiler.name == kept.compiler.name:
            return kept.image(source, defines, target)
        return super().image(source, defines, target)
