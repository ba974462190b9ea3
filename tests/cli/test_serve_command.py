"""`tinychat serve` as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request

import pytest
import uvicorn
from cli_helpers import TINYCHAT
from tiny import tiny_folder

from tinychat.base import locations
from tinychat.serve.server import Server


@pytest.fixture
def hangup():
    """What SIGHUP does, put back afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


def test_the_end_of_the_terminal_is_a_wish_to_end(hangup):
    signal.signal(hangup, signal.SIG_DFL)
    server = Server(uvicorn.Config(app=""), service=None)
    with server.capture_signals():
        os.kill(os.getpid(), hangup)
        server._captured_signals.clear()
    assert server.should_exit
    assert signal.getsignal(hangup) == signal.SIG_DFL


def test_a_server_that_was_begun_to_outlive_its_terminal_does(hangup):
    signal.signal(hangup, signal.SIG_IGN)
    server = Server(uvicorn.Config(app=""), service=None)
    with server.capture_signals():
        os.kill(os.getpid(), hangup)
    assert not server.should_exit


@pytest.mark.slow
def test_the_end_of_its_terminal_keeps_conversations(here, tmp_path):
    """SIGHUP, as SIGTERM: who is being answered has it to its end, and what was read is on disk."""
    folder = tiny_folder(tmp_path / "tiny", context_length=1024)
    command = [*TINYCHAT, "serve", str(folder), "--port", "0", "--ctx", "1024"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        url = ""
        while not url:
            line = server.stderr.readline()
            assert line, "it ended"
            url = next((word for word in line.split() if word.startswith("http://")), "")
        body = {"prompt": "A long story. " * 20, "max_tokens": 100, "stream": True}
        asked = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.readline()
            server.send_signal(signal.SIGHUP)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(30) == 0
    assert list(locations.kv_file("x").parent.glob("served-*.safetensors"))
