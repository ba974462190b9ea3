"""Files are regular, of a bearable size, and the same from the first byte read to the last."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tinychat.base.errors import CheckpointError, ModelNotFoundError, TinychatError, UsageError
from tinychat.base.files import (
    MappedFile,
    OddFileError,
    open_mapped,
    read_bytes,
    read_prose,
    read_text,
    write_atomically,
)


@pytest.fixture(params=["a named pipe", "a socket", "a device", "a folder"])
def odd(request, tmp_path, monkeypatch):
    """What is no regular file, and what it is called."""
    path = tmp_path / "odd"
    if request.param == "a named pipe":
        os.mkfifo(path)
    elif request.param == "a socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        socket.socket(socket.AF_UNIX).bind("odd")
    elif request.param == "a device":
        path.symlink_to("/dev/null")
    else:
        path.mkdir()
    return path, request.param


def test_odd_files_are_refused_at_once_by_what_they_are(odd):
    path, kind = odd
    with pytest.raises(OddFileError, match=kind):
        read_bytes(path)
    with pytest.raises(UsageError, match=kind):
        read_prose(path)
    with pytest.raises(CheckpointError, match=kind):
        open_mapped(path)


def test_nothing_odd_is_replaced_by_a_file(odd):
    path, kind = odd
    before = path.lstat()
    with pytest.raises(TinychatError, match=kind):
        write_atomically(path, b"content")
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_limit_holds_before_anything_is_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(OddFileError, match="are read"):
        read_bytes(path)
    with pytest.raises(UsageError, match="Give a part"):
        read_prose(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OddFileError):
        read_bytes(path, 4)


def test_files_of_the_kernel_have_no_size_and_are_read_within_the_limit():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    assert "Name" in read_text("/proc/self/status")
    with pytest.raises(OddFileError):
        read_bytes("/proc/self/status", 10)


@pytest.mark.parametrize("name", ["missing", "a\0b", "x" * 5000])
def test_names_that_are_no_files_are_two_lines(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be read"):
        read_prose(f"{tmp_path}/{name}")
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        open_mapped(f"{tmp_path}/{name}")


def test_a_file_stays_the_one_that_was_opened(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    mapped = MappedFile(path)
    other = tmp_path / "other"
    other.write_bytes(b"them")
    os.replace(other, path)
    assert bytes(mapped.data) == mapped.read(0, 9) == b"mine"
    assert read_bytes(mapped.same_again) == b"mine"


def test_a_file_that_became_shorter_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    mapped = MappedFile(path)
    mapped.check()
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="became shorter"):
        mapped.check()
    with pytest.raises(CheckpointError, match="changed"):
        mapped.check_unchanged()


SHRINKS = """
import os, sys
from pathlib import Path
from tinychat.base.files import MappedFile
path = Path(sys.argv[1])
path.write_bytes(bytes(100_000))
mapped = MappedFile(path)
os.truncate(path, 10)
print(mapped.data[50_000])
"""


def test_a_map_that_shrinks_under_a_reader_ends_the_process_in_two_lines(tmp_path):
    script = [sys.executable, "-c", SHRINKS, str(tmp_path / "model\x1b.gguf")]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    what, todo = ended.stderr.splitlines()
    assert what.startswith("Error: ")
    assert "model?.gguf became shorter" in what
    assert todo.endswith("start again.")


FOREIGN = """
import faulthandler, mmap, os, sys, tempfile
from pathlib import Path
from tinychat.base.files import MappedFile
faulthandler.enable()
file = tempfile.TemporaryFile()
file.truncate(100_000)
other = mmap.mmap(file.fileno(), 0)
Path(sys.argv[1]).write_bytes(b"x")
mapped = MappedFile(Path(sys.argv[1]))
file.truncate(10)
print(other[50_000])
"""


def test_whoever_handled_bus_errors_before_still_does(tmp_path):
    script = [sys.executable, "-c", FOREIGN, str(tmp_path / "model")]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert ended.returncode < 0
    assert "Fatal Python error: Bus error" in ended.stderr


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x"
    os.mkdir(path) if kind == "folder" else os.mkfifo(path)
    before = path.stat().st_ino
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to("x")
    with pytest.raises(TinychatError, match="not a regular file"):
        write_atomically(path, b"text")
    assert path.stat().st_ino == before
    assert len(list(tmp_path.iterdir())) == 1 + path.is_symlink()
