"""Compiled kernels on disk, the driver's refusals, and opening a device."""

from __future__ import annotations

import multiprocessing
import stat
import threading

import numpy as np
import pytest
from emulation import bench, cache, controls, driver, needs_emulation

from tinychat.backends import cuda_device
from tinychat.base.errors import TinychatError, UsageError
from tinychat.kernels_cuda import layout, modules
from tinychat.kernels_cuda.driver import Device, DeviceError, DeviceMissingError, OutOfMemoryError
from tinychat.kernels_cuda.modules import Cache, Modules
from tinychat.kernels_cuda.nvrtc import CompileError

UNIT = "rows.cu", {}, "sm_86"


class Counting:
    """A compiler that makes nothing."""

    name = "counting 1.0"

    def __init__(self):
        self.made = 0

    def target(self, capability):
        return f"sm_{capability}"

    def compile(self, source, headers, target, defines):
        self.made += 1
        return f"{source.name} {target} {sorted(defines.items())}".encode(), ""


def test_a_source_is_compiled_once(tmp_path):
    compiler = Counting()
    for _ in range(3):
        assert Cache(tmp_path, compiler).image(*UNIT) == b"rows.cu sm_86 []"
    assert compiler.made == 1


def test_whatever_changes_the_result_changes_the_name(tmp_path, monkeypatch):
    compiler = Counting()
    cache = Cache(tmp_path, compiler)
    names = {
        cache.path(*UNIT),
        cache.path("rows.cu", {"A": "1"}, "sm_86"),
        cache.path("rows.cu", {}, "sm_87"),
    }
    names |= {cache.path("rows.cu", {"A": "2"}, "sm_86"), cache.path("embed.cu", {}, "sm_86")}
    compiler.name = "counting 1.1"
    names.add(cache.path(*UNIT))
    sources = tmp_path / "src"
    sources.mkdir()
    for f in modules.SOURCES.iterdir():
        (sources / f.name).write_bytes(f.read_bytes())
    monkeypatch.setattr(modules, "SOURCES", sources)
    assert cache.path(*UNIT) in names
    (sources / "device.cuh").write_text("// another")
    names.add(cache.path(*UNIT))
    assert len(names) == 7


def flip(b):
    b[-1] ^= 1


def cut(b):
    del b[20:]


def empty(b):
    b.clear()


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    compiler = Counting()
    cache = Cache(tmp_path, compiler)
    image = cache.image(*UNIT)
    file = cache.path(*UNIT)
    sound = file.read_bytes()
    data = bytearray(sound)
    damage(data)
    file.write_bytes(data)
    assert cache.image(*UNIT) == image
    assert file.read_bytes() == sound
    assert compiler.made == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    compiler = Counting()
    cache = Cache(tmp_path / "file" / "kernels", compiler)
    assert cache.image(*UNIT) == cache.image(*UNIT)
    assert compiler.made == 2


def _many(folder):
    for _ in range(20):
        image = Cache(folder, Counting()).image(*UNIT)
        assert image == b"rows.cu sm_86 []"


def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(tmp_path,)) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0] * 4
    (file,) = tmp_path.iterdir()  # nothing half-made is left
    assert stat.S_ISREG(file.stat().st_mode)


@needs_emulation
def test_a_module_that_the_driver_does_not_take_is_compiled_again(tmp_path):
    class Stale(type(bench().modules.cache.compiler)):
        made = 0

        def compile(self, *arguments):
            Stale.made += 1
            return (b"nonsense", "") if Stale.made == 1 else super().compile(*arguments)

    m = Modules(bench().device, Cache(tmp_path, Stale()))
    assert m.kernel("logits.cu", "argmax").name == "argmax"
    assert Stale.made == 2
    Stale.made = 0
    again = Modules(bench().device, Cache(tmp_path, Stale()))
    again.kernel("logits.cu", "argmax")
    assert Stale.made == 0


class NoDevice:
    """Takes any module."""

    capability = 86

    def module(self, image):
        return image


def test_what_is_missing_is_compiled_at_once_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(modules.os, "cpu_count", lambda: 3)
    together, heard = threading.Barrier(3), []

    class Together(Counting):
        def compile(self, *arguments):
            together.wait(20)  # raises if they come one after the other
            return super().compile(*arguments)

    sources = [("rows.cu", {}), ("linear.cu", {"A": "1"}), ("linear.cu", {"A": "2"}), ("rows.cu", {})]
    m = Modules(NoDevice(), Cache(tmp_path, Together()), heard.append)
    m.prepare(sources)
    assert m.cache.compiler.made == 3
    assert heard == ["Compiling kernels for sm_86, once for this GPU."]
    m.prepare(sources)
    assert m.cache.compiler.made == 3
    compiler = Counting()
    again = Modules(NoDevice(), Cache(tmp_path, compiler), heard.append)
    again.prepare(sources)
    assert (compiler.made, len(heard)) == (0, 1)  # kept on disk: nothing takes long
    again.prepare([("embed.cu", {})])
    assert (compiler.made, len(heard)) == (1, 2)
    again.prepare([("cache.cu", {})])
    assert (compiler.made, len(heard)) == (2, 2)


def test_a_source_that_does_not_compile_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(modules.os, "cpu_count", lambda: 1)

    class Failing(Counting):
        def compile(self, source, *rest):
            super().compile(source, *rest)
            raise CompileError("rows.cu: no")

    m = Modules(NoDevice(), Cache(tmp_path, Failing()))
    with pytest.raises(CompileError, match="no"):
        m.prepare([("rows.cu", {"A": str(i)}) for i in range(20)])
    assert m.cache.compiler.made == 1


# The driver


@pytest.fixture
def gpu():
    """Sets what the emulated driver pretends to be; back to a usable one afterwards."""
    cuda_device._opened.clear()
    yield controls().fake_device
    controls().fake_device(12060, 1, 86, 8 << 30)
    cuda_device._opened.clear()


def test_no_driver_is_said():
    with pytest.raises(DeviceMissingError, match="No NVIDIA driver"):
        Device("libcuda-that-is-not-there.so.1")


@needs_emulation
@pytest.mark.parametrize(
    ("version", "devices", "capability", "message"),
    [
        (11040, 1, 86, "CUDA 11.4; 12.0"),
        (12060, 0, 86, "no usable NVIDIA GPU"),
        (12060, 1, 75, "compute capability 7.5"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_in_two_lines(gpu, version, devices, capability, message):
    gpu(version, devices, capability, 8 << 30)
    with pytest.raises(UsageError, match=message) as e:
        cuda_device.open_modules(driver())
    assert "--device cpu" in e.value.todo


@needs_emulation
def test_errors_carry_the_drivers_name_for_them():
    d = bench().device
    controls().fake_fail(b"cuMemsetD8Async", 1)
    with pytest.raises(DeviceError, match="cuMemsetD8Async: CUDA_ERROR_INVALID_VALUE"):
        d.clear(d.allocate(100))
    controls().fake_fail(b"cuMemAlloc_v2", 2)
    with pytest.raises(OutOfMemoryError):
        d.allocate(100)
    controls().fake_fail(b"cuMemsetD8Async", 12345)
    with pytest.raises(DeviceError, match="unknown error"):
        d.clear(d.allocate(100))


@needs_emulation
def test_a_capture_that_fails_leaves_the_stream_usable():
    d = bench().device
    with pytest.raises(ZeroDivisionError):
        d.capture(lambda: 1 / 0)
    d.synchronize()
    memory = bench().put(np.arange(10))
    graph = d.capture(lambda: d.clear(memory))
    assert bench().get(memory, 10, np.int64)[3] == 3  # nothing has run yet
    graph.replay()
    assert not bench().get(memory, 10, np.int64).any()


@needs_emulation
def test_slices_and_copies():
    d, a = bench().device, np.arange(100, dtype=np.uint8)
    memory, other = bench().put(a), bench().put(a[::-1])
    d.copy(other[10:20], memory[50:60])
    got = bench().get(other, 100, np.uint8)
    np.testing.assert_array_equal(got[10:20], a[50:60])
    assert (memory[30:].size, memory[:30].size) == (70, 30)


@needs_emulation
def test_a_device_is_tried_before_it_is_trusted(monkeypatch):
    cuda_device.check(bench().modules)
    pack = layout.pack_codes
    monkeypatch.setattr(layout, "pack_codes", lambda codes, form: pack(codes[:, ::-1], form))
    with pytest.raises(TinychatError, match="Emulated GPU computes something else") as e:
        cuda_device.check(bench().modules)
    assert "--device cpu" in e.value.todo


@needs_emulation
def test_kernels_overlap_where_gpu_and_driver_can_and_a_kernel_follows_a_kernel(gpu):
    def overlaps(version, capability):
        gpu(version, 1, capability, 8 << 30)
        d = Device(driver())
        opened, before = Modules(d, cache()), controls().fake_overlaps()
        cuda_device.check(opened)
        d.close()
        return controls().fake_overlaps() - before

    assert overlaps(12060, 86) == overlaps(12020, 90) == 0
    assert overlaps(12030, 90) == 2  # of four products, two follow another at once


@needs_emulation
def test_a_driver_that_refuses_overlapping_kernels_runs_them_one_after_the_other(gpu):
    gpu(12060, 1, 90, 8 << 30)
    d = Device(driver())
    gpu(12060, 1, 86, 8 << 30)  # what d asks for is now refused
    cuda_device.check(Modules(d, cache()))
    assert not d.overlaps


@needs_emulation
def test_the_report_says_what_is_there_and_what_is_missing(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.setenv("TINYCHAT_NVRTC", "/nowhere/libnvrtc.so.12")
    facts = cuda_device.report(driver())
    assert facts["gpu"] == "Emulated GPU, sm_86, 4 processors"
    assert facts["gpu_driver"] == "CUDA 12.6"
    assert "GB" in facts["gpu_memory"]
    assert "nvidia-cuda-nvrtc-cu12" in facts["gpu_problem"]
    with pytest.raises(UsageError, match="cannot be compiled") as e:
        cuda_device.open_modules(driver())
    assert "nvidia-cuda-nvrtc-cu12" in e.value.todo
    gpu(12060, 0, 86, 8 << 30)
    assert cuda_device.report(driver())["gpu"].startswith("none")
