"""What the tests of the screen share; the scripted engine is in `tests/support/scripted.py`."""

from __future__ import annotations

import pytest

from tinychat.chats.chat_store import ChatStore


@pytest.fixture
def store(tmp_path):
    with_store = ChatStore(tmp_path / "chats.db")
    yield with_store
    with_store.close()
