"""What the tests of the command line share; how it is run is in `tests/support/cli_helpers.py`."""

from __future__ import annotations

import pytest
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory and an empty TINYCHAT_HOME."""
    for name in ("TINYCHAT_DEBUG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"
