"""What the tests of the screen share; the scripted engine is in `tests/support/scripted.py`."""

from __future__ import annotations

import pytest

from tinychat.chats.chat_store import ChatStore


@pytest.fixture
def store(tmp_path):
    with_store = ChatStore(tmp_path / "chats.db")
    yield with_store
    with_store.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What is remembered by the way is not the user's."""
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    return tmp_path
