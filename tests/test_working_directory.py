"""Nothing in the folder where somebody stands is imported: by no command, no child, no chat screen."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import Terminal
from tiny import tiny_folder

from tinychat.base.children import python_command

COMMAND = Path(sys.executable).with_name("tinychat")
# Python itself has these loaded before a program that it is told to run by `-m` can say anything.
BY_PYTHON = """
__future__ _collections_abc _sitebuiltins abc codecs collections contextlib encodings enum functools
genericpath importlib io keyword ntpath operator os pkgutil posixpath reprlib runpy site stat sysconfig
types typing warnings weakref zipimport
"""
ONE_SHOT = ["hi", "--temp", "0", "--max-tokens", "3", "--quantize", "none"]


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """A folder with a module of every name that something might import; each leaves a mark and fails."""
    folder = tmp_path_factory.mktemp("traps")
    installed = {
        name
        for name in importlib.metadata.packages_distributions()
        if name.isidentifier() and name != "tinychat"
    }
    names = {*sys.stdlib_module_names, *installed, "sitecustomize", "usercustomize", "pip", "readline"}
    for name in names - set(sys.builtin_module_names):
        (folder / f"{name}.py").write_text(
            f"open(r'{folder}/TRAPPED-{name}', 'w').close()\nraise ImportError\n"
        )
    return folder


@pytest.fixture
def stepped_in(traps):
    """What was imported from the folder, so far."""
    yield lambda: sorted(p.name.removeprefix("TRAPPED-") for p in traps.glob("TRAPPED-*"))
    for mark in traps.glob("TRAPPED-*"):
        mark.unlink()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def environment(tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TINYCHAT"))}
    return kept | {"TINYCHAT_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--version"], "tinychat, version"),
        (["run", "MODEL", *ONE_SHOT], ""),
        (["list", "--all"], "smollm2-135m"),
        (["show", "MODEL"], "llama"),
        (["rm", "nothing", "--yes"], "nothing"),
        (["chats"], ""),
        (["doctor"], ""),
        (["ppl", "MODEL", "TEXT"], ""),
        (["bench", "MODEL", "--help"], ""),
        (["quantize", "MODEL", "--out", "OUT", "--help"], ""),
        (["completion", "bash"], "tinychat"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_no_command_imports_from_the_working_directory(
    arguments, said, traps, stepped_in, model, environment, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("What is said twice is heard once. " * 40)
    places = {"MODEL": str(model), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    out = subprocess.run(
        [str(COMMAND), *(places.get(a, a) for a in arguments)],
        cwd=traps, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert stepped_in() == []
    assert said in out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    assert "Internal error" not in out.stderr


def test_python_m_tinychat_imports_only_what_python_does_before_it(traps, tmp_path, model, environment):
    """`-m` puts the working directory first itself, before any line of ours."""
    folder = tmp_path / "traps"
    shutil.copytree(traps, folder)
    for name in BY_PYTHON.split():
        (folder / f"{name}.py").unlink(missing_ok=True)
    for trap in folder.glob("*.py"):
        trap.write_text(trap.read_text().replace(str(traps), str(folder)))
    out = subprocess.run(
        [sys.executable, "-m", "tinychat", "run", str(model), *ONE_SHOT],
        cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert [p.name for p in folder.glob("TRAPPED-*")] == []
    assert out.returncode == 0, out.stderr


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_the_screen_and_its_engine_answer_there(traps, stepped_in, model, environment, monkeypatch):
    monkeypatch.chdir(traps)
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    home = {"TINYCHAT_HOME": environment["TINYCHAT_HOME"]}
    command = [str(COMMAND), "run", str(model), "--quantize", "none", "--max-tokens", "3", "--temp", "0"]
    with Terminal(command, **home) as t:
        t.wait("ready ·", 60)
        t.type("hello")
        t.press("Enter")
        t.wait("first token", 60)
    assert stepped_in() == []


def test_pip_as_the_last_way_to_a_model_is_the_installed_pip(traps, stepped_in, environment):
    out = subprocess.run(
        python_command("pip", "--version"),
        cwd=traps,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert stepped_in() == []
    assert out.stdout.startswith("pip "), out.stderr


@pytest.mark.parametrize("entry", ["", ".", "HERE"])
def test_a_child_of_a_program_that_trusts_its_folder_does_not(
    traps, stepped_in, environment, monkeypatch, entry
):
    """An interactive Python and a script in that folder have it on their own path; a child gets the rest."""
    monkeypatch.chdir(traps)
    monkeypatch.setattr(sys, "path", [entry.replace("HERE", str(traps)), *sys.path])
    code = python_command("tinychat", "--version")
    out = subprocess.run(
        code, env=environment | {"PYTHONPATH": ":"}, capture_output=True, text=True, timeout=60
    )
    assert out.stdout.startswith("tinychat, version"), out.stderr
    assert stepped_in() == []


def test_a_program_with_a_module_named_like_one_of_pythons_can_start_the_engine(
    tmp_path, monkeypatch, environment
):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "json.py").write_text("raise SystemExit('this is the program, not Python')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "app"), *sys.path])
    out = subprocess.run(
        python_command("tinychat", "--version"), env=environment, capture_output=True, text=True, timeout=60
    )
    assert out.stdout.startswith("tinychat, version"), out.stderr


def test_who_stands_in_the_sources_gets_the_installed_one(tmp_path, model, environment):
    """The checkout's own `tinychat/` comes first there, and half of the package lies beside it."""
    repository = Path(__file__).resolve().parent.parent
    shutil.copytree(
        repository / "tinychat", tmp_path / "tinychat", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = f"import tinychat; print(tinychat.load({str(model)!r}, quantize='none').n_ctx, tinychat.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("256 ")
    assert not out.stdout.split()[1].startswith(str(tmp_path))
