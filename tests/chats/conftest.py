"""What the tests of the store share."""

from __future__ import annotations

import pytest

from tinychat.chats.chat_store import ChatStore


@pytest.fixture
def store(tmp_path):
    with_store = ChatStore(tmp_path / "chats.db")
    yield with_store
    with_store.close()
