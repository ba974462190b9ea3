"""What a process may use: affinity, cgroups and resource limits, not what the hardware has."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import psutil
import pytest

from tinychat.base import machine

GB = 1 << 30


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A cgroup tree of our own, and this process in /outer/inner of it."""
    root = tmp_path / "cgroup"
    (root / "outer" / "inner").mkdir(parents=True)
    own = tmp_path / "self"
    own.write_text("1:name=systemd:/x\n0::/outer/inner\n")
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    memory = type("M", (), {"available": 64 * GB, "total": 96 * GB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return root


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_limits_the_machine_counts(cgroups):
    assert machine.cpu_count() == 16
    assert machine.available_memory() == 64 * GB
    assert machine.total_memory() == 96 * GB
    write(cgroups / "outer", memory__max="max", memory__current=GB, cpu__max="max 100000")
    assert machine.cpu_count() == 16
    assert machine.available_memory() == 64 * GB


@pytest.mark.parametrize("where", [".", "outer", "outer/inner"])
def test_the_tightest_limit_on_the_way_up_counts(cgroups, where):
    write(cgroups / "outer" / "inner", memory__max=32 * GB, memory__current=0, cpu__max="900000 100000")
    write(cgroups / where, memory__max=4 * GB, memory__current=GB, cpu__max="250000 100000")
    assert machine.cpu_count() == 3
    assert machine.available_memory() == 3 * GB
    assert machine.total_memory() == 4 * GB


def test_a_model_larger_than_the_cgroup_is_refused_before_it_is_downloaded(cgroups, tmp_path):
    from tinychat.base.errors import MemoryBudgetError
    from tinychat.hub.transfer import check_room

    check_room(tmp_path, 0, 5 * GB)
    write(cgroups / "outer", memory__max=4 * GB, memory__current=0)
    with pytest.raises(MemoryBudgetError, match=r"4\.3 GB"):
        check_room(tmp_path, 0, 5 * GB)


def test_cached_files_can_be_dropped(cgroups):
    inner = cgroups / "outer" / "inner"
    stat = f"anon 1\ninactive_file {2 * GB}\nactive_file 7"
    write(inner, memory__max=4 * GB, memory__current=3 * GB, memory__stat=stat)
    assert machine.available_memory() == 3 * GB


def test_over_the_limit_is_nothing_left(cgroups):
    write(cgroups / "outer", memory__max=GB, memory__current=2 * GB, cpu__max="1000 100000")
    assert machine.available_memory() == 0
    assert machine.cpu_count() == 1


def test_the_old_cgroups(cgroups):
    write(cgroups / "memory", memory__limit_in_bytes=3 * GB, memory__usage_in_bytes=GB)
    write(cgroups / "cpu", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert machine.available_memory() == 2 * GB
    assert machine.total_memory() == 3 * GB
    assert machine.cpu_count() == 2
    write(cgroups / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=GB)
    write(cgroups / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert machine.available_memory() == 64 * GB
    assert machine.cpu_count() == 16


@pytest.mark.parametrize("own", ["", "garbage", "0::/../../elsewhere", "0::/no/such/group"])
def test_odd_cgroup_files_are_no_error(cgroups, own):
    machine.OWN_CGROUP.write_text(own + "\n")
    write(cgroups, memory__max="many", memory__current="", cpu__max="")
    write(cgroups / "cpu", cpu__cfs_quota_us=100000, cpu__cfs_period_us=0)
    assert machine.cpu_count() == 16
    assert machine.available_memory() == 64 * GB
    machine.OWN_CGROUP.unlink()
    assert machine.cpu_count() == 16


def in_a_process(code, **kwargs):
    out = subprocess.run(
        [sys.executable, "-c", "import os; from tinychat.base.machine import *; " + code],
        capture_output=True,
        text=True,
        check=True,
        **kwargs,
    )
    return int(out.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity (Linux)")
def test_affinity_is_respected():
    one = min(os.sched_getaffinity(0))
    assert in_a_process(f"os.sched_setaffinity(0, [{one}]); print(cpu_count())") == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity (Linux)")
def test_affinity_decides_the_kernels_threads(tmp_path):
    from tiny import tiny_folder

    folder = tiny_folder(tmp_path / "tiny")
    one = min(os.sched_getaffinity(0))
    code = f"os.sched_setaffinity(0, [{one}]); import tinychat; m = tinychat.load({str(folder)!r}); "
    assert in_a_process(code + "print(m.describe()['threads'])") == 1


def test_the_address_space_limit_is_respected():
    limit = 2 * GB

    def less():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    free = in_a_process("print(available_memory())", preexec_fn=less)
    assert 0 < free < limit


def test_peak_memory_counts_what_was_touched():
    code = "before = peak_rss(); x = bytearray(300_000_000); del x; print(peak_rss() - before)"
    assert 290_000_000 < in_a_process(code) < 400_000_000


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (512_000, "512 kB"),
        (94_000_000, "94.0 MB"),
        (4_200_000_000, "4.2 GB"),
        (3_000_000_000_000, "3.0 TB"),
    ],
)
def test_human_bytes(n, text):
    assert machine.human_bytes(n) == text


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from tinychat.base.errors import TinychatError
    from tinychat.base.files import write_atomically

    path = tmp_path / "a" / "b.json"
    write_atomically(path, b"old")
    assert path.read_bytes() == b"old"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    path.unlink()
    path.mkdir()
    with pytest.raises(TinychatError, match="Cannot write"):
        write_atomically(path, b"new")
    assert list(path.parent.iterdir()) == [path]


def test_the_caches_that_our_cores_have_are_counted_once(tmp_path, monkeypatch):
    def cache(core, index, level, size, shared):
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{value}\n")

    for core in range(4):
        cache(core, 2, 2, "1024K", core)
        cache(core, 3, 3, "16M", "0-1" if core < 2 else "2-3")
    monkeypatch.setattr(machine, "CORES", tmp_path)
    for ours, expected in (({0, 1}, 16 << 20), ({0, 1, 2}, 32 << 20), ({9}, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, ours=ours: ours)
        assert machine.cache_bytes() == expected
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("nonsense")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert machine.cache_bytes() == 0
