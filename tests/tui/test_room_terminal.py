"""Files and /compact in a real terminal, with an engine that only plays one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from terminal import Terminal

from tinychat.chats import summary
from tinychat.chats.chat_store import ChatStore

SCREEN = [sys.executable, str(Path(__file__).parent / "open_screen.py")]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_files_are_refused_or_counted_and_a_summary_leads_to_a_branch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("word " * 120)
    with Terminal(SCREEN, 80, 24, TINYCHAT_HOME=str(tmp_path / "home")) as t:
        t.wait("ready · fake")
        t.type("slow 60")
        t.press("Enter")
        t.wait("word59")
        t.wait("ready · fake")
        t.type("/compact")
        t.press("Enter")
        t.wait("Compacted: 66 tokens are 22 now.")
        shown = t.wait("What was said, in short.")
        assert "Summarise our conversation so far." in shown
        assert "‹ 2/2 ›" in shown
        t.type("read @gone.md and @notes.md now")
        t.wait("✗ gone.md  there is no such file")
        t.wait("+ notes.md  600 B, 120 of 914 tokens")
        t.press("Enter")
        t.wait("gone.md cannot be sent: there is no such file.")
        t.press("Enter")  # as text, then
        t.wait("read @gone.md and @notes.md now")
        t.wait("echo: notes.md:")
        t.press("C-q")
        t.wait("ended with 0")
    said = [m.content for m in ChatStore(tmp_path / "home" / "chats.db").messages(1)]
    assert said[0] == "slow 60"  # the whole chat stays
    assert said[2:5:2] == [summary.ASKED, "read @gone.md and @notes.md now"]
