"""The chat screen with the engine of `tests/support/fake_worker.py`; an argument is the chat to open."""

from __future__ import annotations

import sys
from pathlib import Path

from tinychat.base.preferences import Preferences
from tinychat.chats.chat_store import ChatStore
from tinychat.tui.app import make_app

if __name__ == "__main__":
    store = ChatStore()
    chat = store.chat(int(sys.argv[1])) if len(sys.argv) > 1 else None
    worker = [sys.executable, str(Path(__file__).parents[1] / "support/fake_worker.py")]
    sys.exit(make_app("fake", store, chat, command=worker, preferences=Preferences.read()).run_to_end())
