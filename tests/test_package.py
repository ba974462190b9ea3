"""The wheel: what it puts where, and that it works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = (
    "torch",
    "numpy",
    "textual",
    "transformers",
    "tokenizers",
    "rich",
    "jinja2",
    "gguf",
    "starlette",
    "uvicorn",
)


def run(*args, **kwargs):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope="module", params=["python", pytest.param("native", marks=pytest.mark.slow)])
def wheel(request, tmp_path_factory):
    """A wheel built from the sources alone, with the build tools that are here; the kernels take minutes."""
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core: pip install scikit-build-core")
    pytest.importorskip("nanobind", reason="needs nanobind: pip install nanobind")
    out = tmp_path_factory.mktemp("wheel")
    settings = ["--config-settings=build-dir=" + str(out / "build")]
    if request.param == "python":
        settings += ["--config-settings=wheel.cmake=false", "--config-settings=wheel.py-api=py3"]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out]
    built = run(*command, *settings, REPOSITORY, cwd=out)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """site-packages of an environment where only that wheel is installed."""
    target = tmp_path_factory.mktemp("env") / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel]
    done = run(*pip)
    assert done.returncode == 0, done.stderr
    return target


def python(code, *path, cwd):
    """Run code with `path` before the dependencies; -S, so that no other tinychat is found first."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TINYCHAT"))}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return run(sys.executable, "-S", "-c", code, cwd=cwd, env=env)


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"tinychat"}
    assert "tinychat/py.typed" in names
    for part in ("models", "tui", "kernels_cpu", "kernels_cuda", "cli", "formats", "hub", "quantize"):
        assert f"tinychat/{part}/__init__.py" in names
    native = [n for n in names if n.startswith("tinychat/kernels_cpu/_native.") and not n.endswith(".pyi")]
    assert len(native) == ("none-any" not in wheel.name)
    for stray in ("tests/", ".ci", "__pycache__", ".so.", "CMakeCache"):
        assert not [n for n in names if stray in n]
    # Whatever the sources hold besides Python (style sheets, data) is there too.
    for folder, package in (("tinychat", "tinychat"), ("tui", "tinychat/tui"), ("models", "tinychat/models")):
        for file in (REPOSITORY / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"{package}/{file.relative_to(REPOSITORY / folder).as_posix()}" in names


def test_the_metadata_names_the_command_and_the_license(wheel):
    with zipfile.ZipFile(wheel) as z:
        (info,) = {n.split("/")[0] for n in z.namelist() if ".dist-info/" in n}
        metadata = z.read(f"{info}/METADATA").decode()
        assert "tinychat = tinychat.__main__:main" in z.read(f"{info}/entry_points.txt").decode()
        assert any("LICENSE" in n for n in z.namelist())
    assert "Requires-Python: >=3.10" in metadata
    assert "Name: tinychat\n" in metadata
    assert "transformers" not in metadata.split("Provides-Extra")[0]


def test_only_tinychat_lands_in_site_packages(installed):
    found = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert found - {"bin", "__pycache__"} == {"tinychat"}


def test_it_imports_from_outside_the_repository(installed, tmp_path):
    code = (
        "import tinychat, tinychat.models, tinychat.kernels_cpu, tinychat.tui, tinychat.kernels_cuda\n"
        "import tinychat.cli.main\n"
        "print(tinychat.__file__, tinychat.Model.__name__)"
    )
    out = python(code, installed, sysconfig.get_paths()["purelib"], cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(str(installed))
    assert out.stdout.split()[-1] == "Model"
    if list(installed.glob("tinychat/kernels_cpu/_native*.so")):
        code = "from tinychat.kernels_cpu import _native; print(_native.__file__, _native.isa())"
        assert python(code, installed, cwd=tmp_path).stdout.startswith(str(installed))


def test_the_installed_command_says_its_version(installed, tmp_path):
    code = "import sys; sys.argv[1:] = ['--version']; from tinychat.__main__ import main; main()"
    out = python(code, installed, sysconfig.get_paths()["purelib"], cwd=tmp_path)
    assert out.stdout.strip() == "tinychat, version 0.1.0"


def test_a_bare_source_folder_says_what_it_is(tmp_path):
    shutil.copytree(
        REPOSITORY / "tinychat", tmp_path / "tinychat", ignore=shutil.ignore_patterns("__pycache__")
    )
    out = python("import tinychat", cwd=tmp_path)
    assert out.returncode == 1
    error = out.stderr.strip().splitlines()
    assert error[-2].startswith("ImportError: ")
    assert "source folder" in error[-2]
    assert str(tmp_path) in error[-2]
    assert "install" in error[-1]


def test_importing_is_light(tmp_path):
    code = f"import sys, tinychat; print([m for m in {HEAVY!r} if m in sys.modules], dir(tinychat)[:1])"
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.stdout.startswith("[]"), out.stdout + out.stderr


def test_the_command_line_starts_light(tmp_path):
    code = (
        "import sys\nfrom tinychat.cli.main import main\n"
        "try: main(['--help'])\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.stderr.strip() == "[]"


def test_every_public_name_can_be_imported(tmp_path):
    code = "import tinychat; print([n for n in tinychat.__all__ if not hasattr(tinychat, n)])"
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.stdout.strip() == "[]", out.stderr
    code = "import tinychat; tinychat.nonsense"
    assert "has no attribute 'nonsense'" in run(sys.executable, "-c", code, cwd=tmp_path).stderr


def test_a_single_model_without_torch_where_kernels_run(tmp_path):
    """Chatting on the CPU kernels never pays for importing torch."""
    from tiny import tiny_folder

    folder = tiny_folder(tmp_path / "tiny")
    code = (
        f"import sys, tinychat; m = tinychat.load({str(folder)!r}); print(m.describe()['backend'], "
        "m.chat([{'role': 'user', 'content': 'hi'}], max_tokens=3).finish_reason, 'torch' in sys.modules)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    backend, _, torch = out.stdout.split()
    assert (backend, torch) in (("cpu", "False"), ("reference", "True"))
