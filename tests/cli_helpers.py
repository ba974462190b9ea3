"""`tinychat` as its users meet it: real processes, from outside."""

from __future__ import annotations

import subprocess
import sys

TINYCHAT = [sys.executable, "-m", "tinychat"]
GREEDY = ["--temp", "0", "--max-tokens", "12"]


def tinychat(*args, stdin: str | bytes | None = None, **kwargs):
    """Run to the end; text in and out. Without `stdin` there is none (/dev/null)."""
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    if isinstance(stdin, str):
        given["input"] = stdin.encode()
    out = subprocess.run([*TINYCHAT, *map(str, args)], capture_output=True, timeout=120, **given, **kwargs)
    out.stdout, out.stderr = out.stdout.decode(), out.stderr.decode()
    return out


def assert_two_lines(out, code):
    """An error: one line saying what is wrong, one saying what to do, nothing on stdout."""
    assert out.returncode == code, out.stderr
    assert out.stdout == ""
    lines = out.stderr.splitlines()
    assert len(lines) == 2, out.stderr
    assert lines[0].startswith("Error: ")
    assert lines[1].strip()
    assert "Traceback" not in out.stderr
    assert "Internal error" not in out.stderr
