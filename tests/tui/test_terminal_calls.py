"""Tools in a real terminal: a scripted model, a server, and a user who is asked."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from terminal import Terminal

from tinychat.chats.chat_store import ChatStore

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
TESTS = Path(__file__).parents[1]


def test_a_call_is_asked_for_run_allowed_for_good_and_the_server_ends_with_the_chat(tmp_path):
    pytest.importorskip("mcp_types")
    server = str(TESTS / "support" / "odd_mcp_server.py")
    config = tmp_path / "mcp.json"
    config.write_text(
        json.dumps({"mcpServers": {"sums": {"command": sys.executable, "args": ["-S", server]}}})
    )
    config.chmod(0o600)
    screen = [sys.executable, str(TESTS / "tui" / "open_tools.py")]
    paths = os.pathsep.join([str(TESTS), str(TESTS / "support")])
    with Terminal(screen, TINYCHAT_HOME=str(tmp_path), PYTHONPATH=paths) as t:
        t.wait("ready", 60)
        t.type("2 + 3?")
        t.press("Enter")  # waits for the server, which starts
        asked = t.wait("The model wants to call sums/add", 60)
        assert "Adds two numbers." in asked
        t.wait('"b": 3')
        t.wait("esc stops")  # from here on keys are answers
        t.press("a")
        done = t.wait("That makes five.", 30)
        assert '▸ called sums · add {"a": 2, "b": 3}' in done
        assert "▸ ↳ 5" in done
        (process,) = [
            p for p in psutil.Process(t.pid).children(recursive=True) if p.cmdline()[-1:] == [server]
        ]
        t.type("And again?")
        t.press("Enter")
        assert "wants to call" not in t.wait("Five again.", 30)
        t.type("/mcp")
        t.press("Enter")
        t.wait("sums/add · always allowed")
        t.press("Escape")
        t.press("C-q")
        t.wait("ended with 0")
        assert not process.is_running()
    roles = [m.role for m in ChatStore(tmp_path / "chats.db").messages(1)]
    assert roles == ["user", "assistant", "tool", "assistant"] * 2
    assert (tmp_path / "mcp-allowed.json").stat().st_mode & 0o777 == 0o600
