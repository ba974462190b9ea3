"""Copying reaches the terminal (OSC 52) and the desktop's own tool where there is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tinychat.tui import clipboard


@pytest.mark.parametrize(
    ("tool", "display", "arguments"),
    [
        ("wl-copy", {"WAYLAND_DISPLAY": "wayland-0"}, ""),
        ("xclip", {"DISPLAY": ":0"}, "-selection clipboard -in"),
        ("xsel", {"DISPLAY": ":0"}, "--clipboard --input"),
        ("pbcopy", {}, ""),
        ("wl-copy", {"DISPLAY": ":0"}, None),  # not a Wayland session
        ("xclip", {}, None),  # no desktop at all
    ],
)
def test_the_desktops_tool_gets_the_text(tool, display, arguments, tmp_path, monkeypatch):
    script = tmp_path / tool
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n/bin/cat > {tmp_path}/text\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in display.items():
        monkeypatch.setenv(name, value)
    told = []
    clipboard.copy(SimpleNamespace(copy_to_clipboard=told.append), "Grüße $(rm) \x1b[31m\n")
    assert told == ["Grüße $(rm) ␛[31m\n"]
    if arguments is None:
        assert not (tmp_path / "text").exists()
    else:
        assert (tmp_path / "text").read_text() == told[0]
        assert (tmp_path / "arguments").read_text().strip() == arguments


def test_a_broken_tool_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "pbcopy").write_text("not a program")
    (tmp_path / "pbcopy").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = []
    clipboard.copy(SimpleNamespace(copy_to_clipboard=told.append), "text")
    assert told == ["text"]
