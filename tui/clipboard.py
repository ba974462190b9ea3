"""Copying: the terminal's own way (OSC 52), and the desktop's where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess

from textual.app import App

from tinychat.tui.text import clean

_TOOLS = (
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard", "-in"]),
    ("DISPLAY", ["xsel", "--clipboard", "--input"]),
    (None, ["pbcopy"]),
)


def copy(app: App, text: str) -> None:
    """Put text on the clipboard, without control characters: it may be pasted into a shell."""
    text = clean(text)
    app.copy_to_clipboard(text)
    for variable, command in _TOOLS:
        if (variable is None or os.environ.get(variable)) and (tool := shutil.which(command[0])):
            try:
                subprocess.run(
                    [tool, *command[1:]], input=text.encode(), timeout=2, check=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired):
                continue
            return
