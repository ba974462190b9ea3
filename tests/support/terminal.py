"""A real terminal (tmux) for tests: type into it, read its screen, wait for what should appear."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable


class Terminal:
    """One tmux server with one window that runs `command`. A context manager."""

    def __init__(self, command: list[str], width: int = 100, height: int = 30, **environment: str):
        self.socket = f"tinychat-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        settings = [f"{k}={v}" for k, v in environment.items()]
        shell = (
            shlex.join(["env", "-u", "COLUMNS", "-u", "LINES", *settings, *command])
            + "; code=$?; echo; echo ended with $code; exec cat"
        )
        self._tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height),
            "bash", "--norc", "-c", shell,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server", check=False)

    def _tmux(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.socket, *arguments], capture_output=True, text=True, check=False, timeout=30
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        """As if typed."""
        self._tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, Escape, C-b, Up, F1. Each on its own, as fingers do."""
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.12)  # an Escape and what follows at once would be another key

    def paste(self, text: str) -> None:
        """As a terminal pastes (bracketed)."""
        subprocess.run(["tmux", "-L", self.socket, "load-buffer", "-"], input=text, text=True, check=True)
        self._tmux("paste-buffer", "-p")

    def resize(self, width: int, height: int) -> None:
        """The user drags the window's corner."""
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    @property
    def screen(self) -> str:
        """What is on it, with everything at its place."""
        return self._tmux("capture-pane", "-p")

    @property
    def pid(self) -> int:
        """The shell's process; the command is its child."""
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def accept_clipboard(self) -> None:
        """Do what programs say with OSC 52, as many terminals do."""
        self._tmux("set", "-s", "set-clipboard", "on")

    @property
    def clipboard(self) -> str:
        """What was copied last."""
        return self._tmux("show-buffer", check=False)

    @property
    def title(self) -> str:
        """What a program has called the terminal."""
        return self._tmux("display-message", "-p", "#{pane_title}").strip()

    @property
    def modes(self) -> str:
        """What a program may have left switched on: alternate screen, mouse, cursor."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{mouse_any_flag} #{cursor_flag}").strip()

    def wait(self, expected: str | Callable[[str], bool], seconds: float = 20.0) -> str:
        """Until that text is on the screen, or the condition on it holds; the screen."""
        until = time.monotonic() + seconds
        while True:
            screen = self.screen
            if expected in screen if isinstance(expected, str) else expected(screen):
                return screen
            assert time.monotonic() < until, f"{expected!r} never came; the screen:\n{screen}"
            time.sleep(0.05)
