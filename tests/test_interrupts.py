"""Ctrl+C at any moment, full disks, readers that leave: the program ends well and nothing is half done."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_folder
from tiny_gguf import write

from tinychat.formats import open_checkpoint

slow = pytest.mark.slow
TINYCHAT = [sys.executable, "-m", "tinychat"]
# Says that it is here when Python has started and Ctrl+C has become our business.
STARTED = (
    "import sys; from tinychat.__main__ import main; print('started', file=sys.stderr, flush=True); main()"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty TINYCHAT_HOME that can pull `tiny` from a file, and an empty working directory with a text."""
    monkeypatch.delenv("TINYCHAT_DEBUG", raising=False)
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path / "tiny.gguf")
    (tmp_path / "home" / "aliases.json").write_text(json.dumps({"tiny": [f"file:{tmp_path / 'tiny.gguf'}"]}))
    Path("text.txt").write_text("It was a dark and stormy night. " * 60)
    return tmp_path / "home"


def tinychat(*args, **kwargs):
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.run([*TINYCHAT, *map(str, args)], timeout=120, check=False, **given)


def assert_two_lines(out, code: int = 1):
    """An error: what is wrong and what to do, after at most a line of progress."""
    assert out.returncode == code, out.stderr
    what, todo = out.stderr.decode().splitlines()[-2:]
    assert what.startswith("Error: ")
    assert "Internal" not in what
    assert todo
    assert b"Traceback" not in out.stderr


def assert_quiet(err: bytes):
    """Nobody has complained."""
    for word in (b"Traceback", b"Error", b"Exception"):
        assert word not in err


# Ctrl+C


def interrupted(after: float | None, *args) -> tuple[int, bytes, bytes, float]:
    """Exit code, stdout, stderr, duration of a command that gets SIGINT after so many seconds, or never."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline() == b"started\n"
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=60 if after is None else after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


def whole_or_nothing(command: str, home: Path) -> None:
    """What an interrupted command may leave."""
    if command == "pull":
        folder = home / "models" / "tiny"
        assert not folder.exists() or open_checkpoint(folder / "tiny.gguf").tokenizer()
    if command == "quantize":
        assert not Path("out").exists() or open_checkpoint(Path("out")).linear("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("command", "times"),
    [
        ("run", 3),
        ("pull", 3),
        *(pytest.param(c, 60, marks=slow) for c in ("run", "pull", "quantize", "ppl", "list")),
    ],
)
def test_ctrl_c_at_any_moment(folder, home, command, times):
    args = {
        "run": ["run", folder, "hello", "--max-tokens", "200", "--json"],
        "pull": ["pull", "tiny"],
        "quantize": ["quantize", folder, "--out", "out", "--calib", "text.txt"],
        "ppl": ["ppl", folder, "text.txt"],
        "list": ["list"],
    }[command]
    code, _, err, whole = interrupted(None, *args)
    assert code == 0, err
    moments = random.Random(len(command) + times)
    for _ in range(times):
        for made in (home / "models" / "tiny", Path("out"), Path(".out.partial")):
            subprocess.run(["rm", "-rf", made], check=True)
        code, out, err, _ = interrupted(moments.uniform(0, whole), *args)
        assert code in (0, 130), err
        assert_quiet(err)
        if command == "run" and out:
            assert json.loads(out)["finish_reason"] in ("stop", "length", "cancelled")
        whole_or_nothing(command, home)
    code, _, err, _ = interrupted(None, *args)
    assert code == 0, err
    whole_or_nothing(command, home)


def test_ctrl_c_while_python_shuts_down(home):
    code = """
import atexit, os, signal, sys, threading, time
from tinychat.__main__ import main
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv[1:] = ["list"]
main()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert out.returncode in (0, 130)
    assert_quiet(out.stderr)


def test_ctrl_c_that_python_would_swallow_still_counts(home):
    """An interrupt that lands in a weakref's callback or a __del__ is printed and forgotten by Python."""
    code = """
import os, signal, sys, time, tinychat.cli.main as m
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
def run():
    Swallows()
    time.sleep(60)
m.main = run
from tinychat.__main__ import main
main()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert (out.returncode, out.stderr) == (130, b"")


@pytest.mark.parametrize("after", ["main_ends", "main_begins"])
def test_ctrl_c_ends_a_program_whose_thread_does_not(home, after):
    code = f"""
import os, signal, sys, threading, time
import tinychat.cli.main, tinychat.__main__ as m
m.PATIENCE = 0.2
main_begins, main_ends = threading.Event(), threading.Event()
def run():
    main_begins.set()
    while {after == "main_begins"}:
        time.sleep(0.05)
tinychat.cli.main.main = run
def stuck():
    {after}.wait()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
threading.Thread(target=stuck).start()
try:
    m.main()
finally:
    main_ends.set()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (out.returncode, out.stderr) == (130, b"")


# Full disks


def small_files(limit: int):
    """A disk that takes files up to `limit` bytes and no more: writes beyond it fail, as on a full one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("pull", 5000),
        *(pytest.param(c, n, marks=slow) for c in ("pull", "quantize") for n in (0, 2000, 30_000)),
    ],
)
def test_a_full_disk_leaves_no_half_model(folder, home, command, limit):
    args = {"pull": ["pull", "tiny"], "quantize": ["quantize", folder, "--method", "rtn", "--out", "out"]}
    out = tinychat(*args[command], preexec_fn=small_files(limit))
    assert_two_lines(out)
    assert b"space" in out.stderr
    assert not (home / "models" / "tiny").exists()
    assert not list(home.rglob("*.gguf"))
    assert not Path("out").exists()
    # And with room again, the same command works.
    assert tinychat(*args[command]).returncode == 0
    whole_or_nothing(command, home)


def test_a_full_disk_does_not_keep_anyone_from_chatting(folder, home):
    out = tinychat("run", folder, "hello", "--max-tokens", "5", "--temp", "0", preexec_fn=small_files(4096))
    assert out.returncode == 0
    assert out.stdout
    assert out.stderr.count(b"\n") <= 1  # packed weights were not kept: said in one line
    assert b".py" not in out.stderr
    small = {"aliases.json", "hashes.json", "hashes.lock", "settings.json"}
    assert {f.name for f in home.rglob("*") if f.is_file()} <= small


COMMANDS = (
    ["run", "FOLDER", "hello", "--max-tokens", "5"],
    ["ppl", "FOLDER", "text.txt", "--json"],
    ["show", "FOLDER"],
    ["list", "--all"],
    ["list", "--json"],
    ["chats"],
    ["doctor"],
    ["completion", "bash"],
    ["--help"],
    ["run", "--help"],
    ["--version"],
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_that_cannot_be_written_is_an_error(folder, home):
    for command in (COMMANDS[0], COMMANDS[3]):
        args = [folder if a == "FOLDER" else a for a in command]
        with open("/dev/full", "wb") as full:
            assert_two_lines(tinychat(*args, stdout=full))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_is_gone_is_no_error(folder, home, command):
    read, write_end = os.pipe()
    os.close(read)
    out = tinychat(*(folder if a == "FOLDER" else a for a in command), stdout=write_end)
    os.close(write_end)
    assert out.returncode == 0
    assert_quiet(out.stderr)
