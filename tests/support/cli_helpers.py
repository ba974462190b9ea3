"""`tinychat` as its users meet it: real processes, from outside."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings

import pytest

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


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def on_terminal(*args, width: int = 80, typed: str = "") -> tuple[int, str]:
    """The command line in this process, with terminals for stdin, stdout and stderr: the exit code, and what
    is written to both.
    """
    from tinychat.cli.main import main

    written = io.BytesIO()
    out = _Terminal(written, encoding="utf-8", write_through=True)
    keys = _Terminal(io.BytesIO(typed.encode()), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "xterm-256color")
        for name, stream in (("stdin", keys), ("stdout", out), ("stderr", out)):
            patch.setattr(sys, name, stream)
        patch.setattr("builtins.input", lambda prompt="": _line_of(keys, out, prompt))
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
    code = end.value.code
    return (code if isinstance(code, int) else int(bool(code))), written.getvalue().decode()


def _line_of(keys: _Terminal, out: _Terminal, prompt: str) -> str:
    out.write(prompt)
    line = keys.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def in_process(*args, stdin: bytes = b"") -> tuple[int, str, str]:
    """The command line in this process, all three streams pipes: exit code, stdout, stderr. Starting Python
    takes a second on a busy machine; this takes milliseconds.
    """
    from tinychat.cli.main import main

    read, write = os.pipe()
    with open(write, "wb") as pipe:
        pipe.write(stdin)  # no more than a pipe holds
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, open(read, encoding="utf-8") as given:
        for name, stream in (("stdin", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
    code = end.value.code or 0
    return code, *(s.buffer.getvalue().decode() for s in (out, err))
