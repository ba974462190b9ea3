"""What chatting does without: torch is needed by quantizing, the reference and files that torch saved."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cli_helpers import assert_two_lines
from tiny import tiny_folder

import tinychat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def without_torch(tmp_path):
    """Run the command line where no torch is installed."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from tinychat.__main__ import main\n"
        "main()\n"
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tmp_path, env=os.environ | {"TINYCHAT_HOME": str(tmp_path / "home")},
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("arguments", "purpose"),
    [
        (["quantize", "FOLDER", "--out", "OUT"], "Quantizing"),
        (["run", "FOLDER", "hi", "--device", "reference"], "The reference device"),
        (["ppl", "FOLDER", "TEXT", "--device", "reference"], "The reference device"),
    ],
)
def test_what_needs_torch_says_how_to_get_it(arguments, purpose, without_torch, folder, tmp_path):
    (tmp_path / "text").write_text("a few words of text " * 30)
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "TEXT": tmp_path / "text"}
    out = without_torch(*(places.get(a, a) for a in arguments))
    assert_two_lines(out, 1)
    assert out.stderr == (
        f'Error: {purpose} needs torch, which is not installed.\nInstall it: pip install "torch>=2.4"\n'
    )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_torch_saved_says_so_too(without_torch, folder, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (saved / file.name).write_bytes(file.read_bytes())
    (saved / "tiny-w4-g64-awq.pt").write_bytes(b"PK\3\4")
    out = without_torch("run", saved, "hi")
    assert_two_lines(out, 1)
    assert "needs torch" in out.stderr


@pytest.mark.parametrize("command", ["run", "show", "ppl", "bench", "list", "chats"])
def test_everything_else_works_without_it(command, without_torch, folder, tmp_path):
    (tmp_path / "text").write_text("a few words of text " * 30)
    arguments = {
        "run": [folder, "hi", "--temp", "0", "--max-tokens", "3"],
        "show": [folder],
        "ppl": [folder, tmp_path / "text"],
        "bench": [folder, "--json"],
    }
    out = without_torch(command, *arguments.get(command, []))
    assert out.returncode == 0, out.stderr


def test_a_broken_torch_is_not_said_to_be_missing(monkeypatch, tmp_path, folder):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import torch._part_that_is_gone\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="_part_that_is_gone"):
        tinychat.load(folder, device="reference")
