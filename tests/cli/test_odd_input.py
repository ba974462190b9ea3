"""What the system and libraries raise, in two lines; names, numbers and texts that nobody foresaw."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3

import click
import pytest
from cli_helpers import GREEDY, in_process, on_terminal, tinychat
from tiny import tiny_folder

from tinychat.base import errors
from tinychat.cli.options import Name


def raised(call):
    try:
        call()
    except BaseException as e:
        return e
    raise AssertionError("nothing was raised")


def deep(n=100_000):
    return json.loads("[" * n)


@pytest.mark.parametrize(
    ("make", "code", "part"),
    [
        (lambda: os.open("/no/such", os.O_RDONLY), 1, "/no/such"),
        (lambda: os.mkdir("/proc"), 1, "/proc"),
        (lambda: os.stat("/proc\0"), 1, None),
        (lambda: sqlite3.connect("/no/such/folder/x").execute("select 1"), 1, "unable to open"),
        (lambda: "\ud800".encode(), 2, "Unicode"),
        (lambda: b"\xff".decode(), 2, "Unicode"),
        (deep, 1, "nested"),
        (lambda: bytearray(1 << 62), 4, "Memory"),
        (lambda: __import__("no_such_module"), 1, "no_such_module"),
    ],
)
def test_what_libraries_raise_is_said_as_what_it_is(make, code, part):
    error = errors.of(raised(make))
    if part is None:  # a mistake of ours is not dressed up as the user's
        assert error.what.startswith("Internal error: ValueError")
        return
    assert error.exit_code == code
    assert part in error.what
    assert "Internal" not in error.what + error.todo


@pytest.mark.parametrize(
    "name", ["ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EACCES", "EROFS", "EAGAIN", "EIO", "ENOMEM"]
)
def test_what_the_system_refuses_is_said_with_the_file(name):
    number = getattr(errno, name)
    error = errors.of(OSError(number, os.strerror(number), "/some/file\x1b\nname"))
    assert "\n" not in error.what
    assert error.todo


def test_an_error_of_ours_stays_itself():
    e = errors.UsageError("a", "b")
    assert errors.of(e) is e


# Any name, any number, any text, in every command. The seconds that real processes would take are why these
# run in this one.

ODD = [
    "",
    " ",
    "\n",
    "a\nb",
    "a\0b",
    "\udcff",
    "\ud800",
    "-",
    "~",
    "~no-such-user",
    "..",
    "/",
    "/dev/null",
    "x" * 300,
]
ODD += [
    "x" * 5000,
    "日本",
    "a/b/c/d",
    "a//b",
    "hf:",
    "hf:a/b\n",
    "pypi:",
    "file:",
    "file:.",
    "file:\0",
    "[x]",
]
ODD += [
    "file:~no-such-user/x.gguf",
    "0",
    "1e9",
    "9" * 30,
    "9" * 5000,
    "m",
    "m/config.json",
    "empty",
    "d",
    "..gguf",
]
ODD += ["\u0663", "%s{}", "\x1b[31m", "'; drop", "C:\\x", "m/..", ".hidden", "fifo"]
COMMANDS = [
    ["run", "ODD", "hi", "--offline", *GREEDY],
    ["run", "ODD", "--offline", *GREEDY],
    ["run", "-c", "ODD", "--offline", *GREEDY],
    ["run", "m", "hi", "-f", "ODD", *GREEDY],
    ["run", "m", "hi", "-s", "ODD", *GREEDY],
    ["run", "m", "hi", "--stop", "ODD", *GREEDY],
    ["run", "m", "hi", "--draft", "ODD", "--offline", *GREEDY],
    ["run", "m", "hi", "--kv-disk-budget", "ODD", *GREEDY],
    ["run", "--resume", "ODD", "hi"],
    ["show", "ODD"],
    ["pull", "ODD"],
    ["rm", "ODD", "-y"],
    ["ppl", "m", "ODD"],
    ["bench", "--synthetic", "ODD"],
    ["chats", "ODD"],
    ["chats", "export", "ODD"],
    ["chats", "rm", "ODD"],
    ["completion", "ODD"],
    ["ODD"],
]


@pytest.fixture
def full(here, monkeypatch):
    """A working directory with all sorts of things in it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(here / "hf"))
    tiny_folder(here / "m")
    (here / "empty").write_bytes(b"")
    (here / "d").mkdir()
    os.mkfifo(here / "fifo")
    return here


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: "-".join(c[:2]))
def test_no_name_number_or_text_is_an_internal_error(full, command):
    for odd in ODD:
        code, out, err = in_process(*[odd if a == "ODD" else a for a in command])
        said = (odd[:50], code, err)
        assert code in (0, 1, 2, 3, 4), said
        assert "Internal error" not in err, said
        assert "Traceback" not in err, said
        if code:
            assert err.count("Error: ") == 1, said
            assert out == "", said


NUMBERS = [
    "",
    "0",
    "-1",
    "1",
    "7",
    "1e400",
    "nan",
    "inf",
    "1.5",
    str(1 << 31),
    str(1 << 63),
    "9" * 30,
    "\u0661",
    "x",
]
FLAGS = ["--temp", "--top-p", "--top-k", "--min-p", "--repeat-penalty", "--max-tokens", "--seed", "--ctx"]
FLAGS += ["--kv-budget", "--kv-bits", "--threads", "--act-bits", "--head-bits", "--draft-tokens", "--resume"]


@pytest.mark.parametrize("flag", FLAGS)
def test_no_number_is_an_internal_error(full, flag):
    for value in NUMBERS:
        code, _, err = in_process("run", "m", "hi", "--max-tokens", "2", "-v", flag, value)
        assert code in (0, 1, 2, 4), (value, err)
        assert "Internal error" not in err, (value, err)


def test_a_benchmark_larger_than_the_memory_is_refused_before_it_begins(full, monkeypatch):
    monkeypatch.setattr("tinychat.base.machine.available_memory", lambda: 100_000)
    code, out, err = in_process("bench", "m", "-p", 4096, "-n", 1)
    assert (code, out) == (4, "")
    assert err.startswith("Error: A cache of 4096 tokens takes ")


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800"])
def test_what_can_be_no_file_is_refused_as_one(name):
    for limits in ({}, {"exists": True, "dir_okay": False}):
        with pytest.raises(click.UsageError, match="is not the name of a file"):
            Name(**limits).convert(name, None, None)


# The machine around it

HOMES = {
    "a file": "file",
    "below a file": "file/x",
    "nowhere": "/proc/nope",
    "with spaces": "a b/c d",
    "relative": "r",
}


@pytest.mark.parametrize("home", HOMES.values(), ids=HOMES.keys())
def test_a_home_that_cannot_be_is_said(full, home, monkeypatch):
    (full / "file").write_text("x")
    monkeypatch.setenv("TINYCHAT_HOME", home)
    for args in (
        ["run", "m", "hi", *GREEDY],
        ["run", "m", "-c", "hi", *GREEDY],
        ["list"],
        ["chats"],
        ["chats", "rm", "1"],
        ["pull", "hf:a/b"],
        ["rm", "x", "-y"],
        ["doctor"],
    ):
        code, _, err = in_process(*args)
        assert code in (0, 1, 2, 3), (args, err)
        assert "Internal error" not in err, (args, err)


@pytest.mark.parametrize(
    "variables",
    [
        {"COLUMNS": "1"},
        {"COLUMNS": "abc", "LINES": "-3"},
        {"COLUMNS": "0", "TERM": "nonsense"},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
        {"TINYCHAT_OFFLINE": "maybe", "TINYCHAT_DEBUG": ""},
        {"HF_HOME": "/proc/nope", "HF_ENDPOINT": "nonsense", "HF_TOKEN": "a\nb"},
        {"PIP_INDEX_URL": "nonsense", "PIP_CONFIG_FILE": "/dev/null"},
        {"HOME": "", "XDG_DATA_HOME": "relative"},
        {"TMPDIR": "/no/such", "LANG": "xx_YY", "LC_ALL": "nonsense"},
    ],
    ids=lambda v: "-".join(v),
)
def test_odd_settings_of_the_environment_are_no_internal_error(full, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for args in (
        ["list", "--all"],
        ["doctor"],
        ["show", "m"],
        ["pull", "pypi:x"],
        ["run", "m", "hi", *GREEDY],
    ):
        code, _, err = in_process(*args)
        assert code in (0, 1, 2, 3), (args, err)
        assert "Internal error" not in err, (args, err)


def test_a_number_of_files_that_is_too_small_is_said(full):
    for most in (9, 12):
        out = tinychat(
            "run", "./m", "hi", *GREEDY,
            preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
        )  # fmt: skip
        assert "Internal error" not in out.stderr
        if out.stderr.startswith("Error: "):  # Python itself may not start
            assert out.stderr == "Error: Too many files are open.\nRaise the limit: ulimit -n 1024\n"


def test_threads_that_the_system_does_not_give_are_done_without(full):
    """512 stacks do not fit; the answer is the same as with two threads."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    few = tinychat("run", "./m", "hi", *GREEDY, "--threads", "2")
    many = tinychat("run", "./m", "hi", *GREEDY, "--threads", "512", preexec_fn=limit)
    assert (many.returncode, many.stderr) == (0, "")
    assert many.stdout == few.stdout


def test_no_line_that_is_typed_ends_a_conversation(full):
    odd = [
        "",
        "x",
        "a\0b",
        "..",
        "/",
        "~no-such-user/x",
        "d",
        "fifo",
        "empty",
        "/dev/null",
        "x" * 300,
        "日本",
        "-1",
        "m",
    ]
    odd += [
        "temperature nan",
        "top_k 1.5",
        f"top_k {'9' * 30}",
        "seed -1",
        "max_tokens x",
        "stop x",
        "d/out.json",
    ]
    names = ["help", "system", "set", "regen", "edit", "stats", "save", "load", "new", "nope", "", "/"]
    lines = (
        [f"/{name} {o}" for name in names for o in odd]
        + [o for o in odd if "/" not in o]
        + ['"""', "a", '"""']
    )
    code, shown = on_terminal(
        "run", "m", "--plain", "--max-tokens", "2", typed="\n".join([*lines, "/stats", ""])
    )
    assert code == 0
    assert "Internal error" not in shown
    assert "Traceback" not in shown
    assert shown.splitlines()[-2].startswith(("context ", "prompt ", ">>> context"))
    assert on_terminal("run", "m", "--plain", typed="/exit\n")[0] == 0  # with all that in its history
