"""What tests of the engine's process share: the fake worker, and waiting for its events."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from tinychat.conversation import Message

FAKE = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]


class Heard(list):
    """Events, and waiting for one of a kind."""

    async def wait(self, kind, n=1, seconds=20.0):
        until = time.monotonic() + seconds
        while len(found := [e for e in self if isinstance(e, kind)]) < n:
            assert time.monotonic() < until, f"no {kind.__name__} among {list(self)}"
            await asyncio.sleep(0.005)
        return found[n - 1]


def ask(client, text, *before):
    path = [Message(role, content) for role, content in (*before, ("user", text))]
    client.answer("1", path, None, {"temperature": 0})
