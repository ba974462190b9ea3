"""The folder that a quantized model is written to: kills survived, nothing of others replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TinyCheckpoint, files

from tinychat.base.errors import TinychatError, UsageError
from tinychat.quantize import folder, quantize

SUPPORT = Path(__file__).parents[1] / "support"

KILLED = """
import os, signal, sys
from pathlib import Path
from tiny import TinyCheckpoint
from tinychat.quantize import folder, quantize

write = folder.OutputFolder.write_block
def write_then_die(self, layer, tensors):
    write(self, layer, tensors)
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
folder.OutputFolder.write_block = write_then_die
quantize(TinyCheckpoint(n_layers=3), Path(sys.argv[1]), calib_file=Path(sys.argv[2]))
"""


def test_after_a_kill_the_same_call_goes_on_and_gives_the_same_folder(tmp_path, text):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(text)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list((tmp_path / ".out.partial").glob("block-*.safetensors"))) == 2
    blocks = []
    quantize(
        TinyCheckpoint(n_layers=3),
        out,
        calib_file=text,
        progress=lambda done, total, what: blocks.append(what),
    )
    assert not (tmp_path / ".out.partial").exists()
    quantize(TinyCheckpoint(n_layers=3), tmp_path / "whole", calib_file=text)
    assert files(out) == files(tmp_path / "whole")


def test_what_another_job_left_is_not_mixed_in(tmp_path, text, monkeypatch):
    out = tmp_path / "out"

    def full(self, *args):
        raise TinychatError("No space left.", "Free some.")

    with monkeypatch.context() as m:
        m.setattr(folder.OutputFolder, "finish", full)
        with pytest.raises(TinychatError):
            quantize(TinyCheckpoint(seed=1), out, calib_file=text)
    quantize(TinyCheckpoint(seed=2), out, calib_file=text)
    quantize(TinyCheckpoint(seed=2), tmp_path / "clean", calib_file=text)
    assert files(out) == files(tmp_path / "clean")


def test_a_cut_block_file_is_made_again(tmp_path, text, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(folder, "write_settings", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(TinychatError, match="No space left"):
            quantize(TinyCheckpoint(), out, calib_file=text)
    assert not out.exists()
    block = tmp_path / ".out.partial" / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    quantize(TinyCheckpoint(), out, calib_file=text)
    quantize(TinyCheckpoint(), tmp_path / "clean", calib_file=text)
    assert files(out) == files(tmp_path / "clean")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_two_lines(tmp_path, text, monkeypatch):
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, *a, **k: real(Path("/dev/full") if p.suffix == ".tmp" else p, *a, **k)
    )
    with pytest.raises(TinychatError, match="No space left") as e:
        quantize(TinyCheckpoint(), tmp_path / "out", calib_file=text)
    assert len(str(e.value).splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_only_our_own_folders_are_replaced(tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    quantize(TinyCheckpoint(seed=1), out, method="rtn", ranges="whole")  # an empty folder is fine
    first = files(out)
    quantize(TinyCheckpoint(seed=2), out, method="rtn", ranges="whole")
    assert files(out)["model.safetensors"] != first["model.safetensors"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists"):
        quantize(TinyCheckpoint(), theirs, method="rtn", ranges="whole")
    assert files(theirs) == {"thesis.txt": b"years of work"}
    with pytest.raises(UsageError, match="exists"):
        quantize(TinyCheckpoint(), theirs / "thesis.txt", method="rtn", ranges="whole")


def test_two_runs_cannot_write_the_same_folder(tmp_path):
    job = {"group_size": 32}
    with folder.OutputFolder(tmp_path / "out", job), pytest.raises(UsageError, match="Another"):
        folder.OutputFolder(tmp_path / "out", job).__enter__()
