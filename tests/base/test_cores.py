"""What the processor's cores are, read from a made-up /sys."""

from __future__ import annotations

import os

import pytest

from tinychat.base import cores, machine
from tinychat.base.cores import Cores


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Makes the files of a processor: for each logical core the ones that share it, and other files."""

    def make(siblings, atom=None, **files):
        for n, shared in enumerate(siblings):
            folder = tmp_path / "cpu" / f"cpu{n}"
            (folder / "topology").mkdir(parents=True)
            (folder / "topology" / "thread_siblings_list").write_text(f"{shared}\n")
            for name, values in files.items():
                file = folder / name.replace("__", "/")
                file.parent.mkdir(exist_ok=True)
                file.write_text(f"{values[n]}\n")
        if atom:
            (tmp_path / "cpu_atom").mkdir()
            (tmp_path / "cpu_atom" / "cpus").write_text(f"{atom}\n")
        monkeypatch.setattr(machine, "CORES", tmp_path / "cpu")
        monkeypatch.setattr(cores, "DEVICES", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(siblings))), raising=False)
        monkeypatch.setattr(machine, "cpu_count", lambda: len(siblings))
        monkeypatch.setattr(cores.sys, "platform", "linux")
        return cores.cores()

    return make


def test_a_desktop_with_two_threads_a_core(system):
    found = system(["0,4", "1,5", "2,6", "3,7"] * 2)
    assert found == Cores(threads=8, logical=8, physical=4)
    assert found.sentence() == "4 with 8 threads"
    assert found.candidates() == [4, 8]


def test_a_laptop_with_fast_and_slow_cores(system):
    fast = [f"{n},{n + 1}" for n in (0, 2, 4, 6, 8, 10) for _ in range(2)]
    found = system([*fast, *map(str, range(12, 20))], atom="12-19")
    assert found == Cores(threads=20, logical=20, physical=14, fast=12)
    assert found.sentence() == "14 with 20 threads, 12 of the threads on fast cores"
    assert found.candidates() == [6, 10, 12, 14, 20]


@pytest.mark.parametrize("file", ["cpu_capacity", "cpufreq__cpuinfo_max_freq"])
def test_an_arm_board_with_two_kinds_of_cores(system, file):
    found = system([str(n) for n in range(8)], **{file: [400] * 4 + [1000] * 3 + [1024]})
    assert found == Cores(threads=8, logical=8, physical=8, fast=4)
    assert found.sentence() == "8, 4 of them fast"
    assert found.candidates() == [4, 8]


def test_cores_whose_clocks_differ_a_little_are_alike(system):
    found = system(["0", "1"], cpufreq__cpuinfo_max_freq=[5_000_000, 5_300_000])
    assert found == Cores(threads=2, logical=2, physical=2)
    assert found.candidates() == [2]


def test_a_machine_that_says_nothing(system, monkeypatch, tmp_path):
    system(["0", "1", "2"])
    monkeypatch.setattr(machine, "CORES", tmp_path / "nothing")
    assert cores.cores() == Cores(threads=3, logical=3)
    assert cores.cores().candidates() == [1, 3]


def test_a_cgroup_that_gives_less_time(system, monkeypatch):
    system(["0,1", "0,1", "2,3", "2,3"])
    monkeypatch.setattr(machine, "cpu_count", lambda: 3)
    assert cores.cores().sentence() == "2 with 4 threads; a cgroup gives the time of 3"
    assert cores.cores().candidates() == [2, 3]


def test_a_list_that_nobody_understands_is_as_none(system):
    assert system(["0", "1"], atom="what?").fast is None


def test_macos_is_asked(monkeypatch):
    said = {"hw.perflevel0.logicalcpu": 8, "hw.perflevel1.logicalcpu": 4, "hw.physicalcpu": 12}
    monkeypatch.setattr(cores.sys, "platform", "darwin")
    monkeypatch.setattr(cores, "_sysctl", said.get)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(machine, "cpu_count", lambda: 12)
    assert cores.cores() == Cores(threads=12, logical=12, physical=12, fast=8)
    assert cores.cores().candidates() == [6, 8, 12]


def test_a_system_without_sysctl_says_nothing():
    assert cores._sysctl("hw.no.such.name") is None
