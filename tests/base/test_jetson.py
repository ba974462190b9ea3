"""What doctor says of a Jetson, from the files that one has."""

from __future__ import annotations

import pytest

from tinychat.base import jetson

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n"


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A root with an Orin NX's files; nvpmodel answers `mode`."""

    def make(release=RELEASE, mode="MAXN", clocks=(306, 918, 1173)):
        files = {"etc/nv_tegra_release": release, "proc/device-tree/model": "NVIDIA Jetson Orin NX\0"}
        gpu = "sys/class/devfreq/17000000.gpu"
        for name, mhz in zip(("min", "cur", "max"), clocks, strict=True):
            files[f"{gpu}/{name}_freq"] = f"{mhz}000000\n"
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        tool = tmp_path / "bin/nvpmodel"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\necho 'NV Power Mode: {mode}'\necho 0\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        return jetson.report(tmp_path)

    return make


def test_another_machine_has_nothing_to_say(tmp_path):
    assert jetson.report(tmp_path) == {}


def test_module_release_power_mode_and_clock(board):
    assert board() == {
        "jetson": "NVIDIA Jetson Orin NX",
        "l4t": "R36.4.3 (JetPack 6)",
        "power_mode": "MAXN",
        "gpu_clock": "918 of 1173 MHz, rises on demand; sudo jetson_clocks pins it",
        "problems": [],
    }
    assert "pinned" in board(clocks=(1173, 1173, 1173))["gpu_clock"]


def test_what_holds_it_back_is_said(board):
    assert "nvpmodel -m 0" in board(mode="15W")["problems"][0]
    (problem,) = board(release=RELEASE.replace("R36", "R35"))["problems"]
    assert "JetPack 6" in problem


def test_without_nvpmodel_the_mode_is_left_out(board, monkeypatch, tmp_path):
    board()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "power_mode" not in jetson.report(tmp_path)
