"""Ctrl+C, from the first import to the last step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from cli_helpers import TINYCHAT


def interrupted(folder, where, nth=1, *flags):
    """Run a command line that gets a real SIGINT when it calls `where` for the nth time."""
    module, _, function = where.partition(":")
    code = f"""
import importlib, os, signal, sys
owner = importlib.import_module({module!r})
*outer, name = {function!r}.split(".")
for part in outer:
    owner = getattr(owner, part)
inner, calls = getattr(owner, name), []
def call(*args, **kwargs):
    calls.append(1)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.SIGINT)
    return inner(*args, **kwargs)
setattr(owner, name, call)
from tinychat.cli.main import main
main(sys.argv[1:])
"""
    args = ["run", str(folder), "hello " * 20, "--temp", "0", "--draft", "none", *flags]
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
    )


def test_ctrl_c_while_the_program_imports_itself(here):
    code = """
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
runpy.run_module("tinychat", run_name="__main__")
"""
    for module in ("click", "tinychat.cli.reports"):
        out = subprocess.run([sys.executable, "-c", code, "list", module], capture_output=True, timeout=60)
        assert (out.returncode, out.stdout, out.stderr) == (130, b"", b"")


def test_ctrl_c_while_loading(folder, here):
    for where in ("tinychat.loading:open_checkpoint", "tinychat.model:Model.__init__"):
        out = interrupted(folder, where)
        assert (out.returncode, out.stdout, out.stderr.strip()) == (130, b"", b"")


def test_ctrl_c_while_prefilling(folder, here):
    out = interrupted(folder, "tinychat.engine.engine:Engine.execute", 1)
    assert (out.returncode, out.stderr) == (130, b"")
    assert len(out.stdout) <= 5  # at most the token that was under way


def test_ctrl_c_while_decoding_keeps_what_was_said(folder, here):
    whole = interrupted(
        folder, "tinychat.engine.engine:Engine.execute", 10**9, "--max-tokens", "40"
    ).stdout.decode()
    out = interrupted(folder, "tinychat.engine.engine:Engine.execute", 12, "--max-tokens", "40")
    assert out.returncode == 130
    assert out.stderr == b""
    said = out.stdout.decode().removesuffix("\n").rstrip("\ufffd")
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole) - 5


def test_ctrl_c_still_gives_whole_json(folder, here):
    out = interrupted(folder, "tinychat.engine.engine:Engine.execute", 12, "--json")
    assert out.returncode == 130
    answer = json.loads(out.stdout)
    assert answer["finish_reason"] == "cancelled"
    assert 5 < answer["stats"]["generated_tokens"] < 15


def test_a_second_ctrl_c_does_not_wait(folder, here):
    # The step after the first one hangs; the second interrupt must get through.
    code = """
import os, signal, sys, tinychat.engine.engine as e
inner, calls = e.Engine.execute, []
def execute(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
        print("hanging", file=sys.stderr, flush=True)
        signal.pause()
    return inner(*args, **kwargs)
e.Engine.execute = execute
from tinychat.cli.main import main
main(sys.argv[1:])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(folder), "hello", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline() == b"hanging\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_on_the_demo_model(demo_gguf, here):
    process = subprocess.Popen(
        [
            *TINYCHAT,
            "run",
            str(demo_gguf),
            "Tell me a very long story.",
            "--temp",
            "0",
            "--max-tokens",
            "4000",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert (first + out).endswith(b"\n")
    assert len(out) < 2000


def test_ctrl_c_while_a_class_is_being_made_is_ctrl_c(capsys):
    """Python 3.11 and earlier wrap what is raised in `__set_name__`."""
    from tinychat.cli.main import INTERRUPTED, report

    class Field:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    with pytest.raises((RuntimeError, KeyboardInterrupt)) as raised:
        type("Made", (), {"field": Field()})
    assert report(raised.value) == INTERRUPTED
    assert "Internal error" not in capsys.readouterr().err
