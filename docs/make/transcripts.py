"""Transcripts in the documents: what follows each command is what the command wrote."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable

MARK = "<!-- transcript -->"
WIDTH = 120
_BLOCK = re.compile(rf"({re.escape(MARK)}\n```console\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)


def remade(text: str, run: Callable[[str], str] | None = None) -> str:
    """A page with each marked block's commands run anew, in the order of the page and in one empty home. run:
    what runs them; without it bash does, with the demo model pulled beforehand.
    """
    if not _BLOCK.search(text):
        return text
    if run is not None:
        return _BLOCK.sub(lambda m: m[1] + _again(m[2], run) + m[3], text)
    with tempfile.TemporaryDirectory() as home:
        shell = Shell(home)
        shell.run("tinychat pull smollm2-135m")
        return _BLOCK.sub(lambda m: m[1] + _again(m[2], shell.run) + m[3], text)


def blocks(text: str) -> list[str]:
    """The marked blocks of a page."""
    return [m[2] for m in _BLOCK.finditer(text)]


def _again(block: str, run: Callable[[str], str]) -> str:
    lines = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{_folded(run(line[2:]))}" for line in lines)


def _folded(written: str) -> str:
    """Lines of at most WIDTH characters; tables stay as they are."""
    out = []
    for line in written.splitlines():
        out += textwrap.wrap(line, WIDTH) if len(line) > WIDTH else [line.rstrip()]
    return "".join(f"{line}\n" for line in out)


class Shell:
    """Commands in one home, from one empty folder."""

    def __init__(self, home: str):
        self.folder = os.path.join(home, "notes")
        os.mkdir(self.folder)
        self.env = {**os.environ, "TINYCHAT_HOME": home, "NO_COLOR": "1", "COLUMNS": "100"}

    def run(self, line: str) -> str:
        """What a line of bash writes to stdout and stderr together."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.stdout.decode()
