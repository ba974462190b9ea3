"""The chat screen with a model that says what is scripted here, and the MCP servers of mcp.json."""

from __future__ import annotations

import sys

import pytest
from said import says
from tiny import tiny_model

from tinychat.chats.chat_store import ChatStore
from tinychat.mcp.toolbox import Toolbox
from tinychat.process.local import LocalEngine
from tinychat.tui.app import make_app

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def load(*_: object):
    """A tiny model."""
    model = tiny_model(ctx=4096, backend="cpu", context_length=4096)
    says(pytest.MonkeyPatch(), model, f"I add.\n{CALL}", "That makes five.", CALL, "Five again.")
    return model


if __name__ == "__main__":
    engine = LocalEngine(lambda event: None, load)
    sys.exit(make_app("tiny", ChatStore(), engine=engine, toolbox=Toolbox.found()).run_to_end())
