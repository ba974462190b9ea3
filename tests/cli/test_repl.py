"""A conversation line by line in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import termios
import time

import psutil
from cli_helpers import GREEDY, TINYCHAT
from tiny import tiny_folder


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *args, env=None):
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xc8\x00\x00\x00\x00\x00")

        def own_the_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*TINYCHAT, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=own_the_terminal,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
        )
        os.close(slave)
        self.seen = self.unread = ""

    def type(self, text):
        """Press keys."""
        os.write(self.fd, text.encode())

    def expect(self, pattern, timeout=60):
        """Wait until the screen shows it; everything up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.unread)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            try:
                more = os.read(self.fd, 65536) if ready else b""
            except OSError:  # the other side is gone
                more = b""
            assert more, f"no {pattern!r} in {self.unread!r}"
            self.unread += more.decode(errors="replace")
            self.seen += more.decode(errors="replace")
        shown, self.unread = self.unread[: match.end()], self.unread[match.end() :]
        return shown

    def wait_until_it_listens(self, timeout=30):
        """Until it sleeps: Python's input() misses a signal that comes just before it begins to wait."""
        deadline = time.monotonic() + timeout
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline

    def ends(self, timeout=30):
        """The exit code, once it has ended by itself."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not select.select([self.fd], [], [], 0.1)[0]:
                if self.process.poll() is not None:
                    break
                continue
            try:
                more = os.read(self.fd, 65536)
            except OSError:
                break
            if not more:
                break
            self.seen += more.decode(errors="replace")
        return self.process.wait(timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


PROMPT = ">>> "


def test_a_conversation_line_by_line(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("hello\r")
        answer = t.expect(PROMPT)
        assert "Error" not in answer
        t.type("/stats\r")
        assert "context" in t.expect(PROMPT)
        t.type("/continue\r")
        t.expect(PROMPT)
        t.type('"""\r')
        t.expect(r"\.\.\. ")
        t.type("line one\r")
        t.expect(r"\.\.\. ")
        t.type('line two\r"""\r')
        t.expect(r"\.\.\. ")
        t.expect(PROMPT)
        t.type("continued \\\r")
        t.expect(r"\.\.\. ")
        t.type("here\r")
        t.expect(PROMPT)
        t.type("/regen\r")
        t.expect(PROMPT)
        t.type("/edit other words\r")
        t.expect(PROMPT)
        t.type("/tree\r")
        assert re.search(r"5 branches.*▌ other words", t.expect("/go N goes to one"), re.S)
        t.expect(PROMPT)
        t.type("/go 2\r")
        t.expect(">>> continued ")
        t.expect(PROMPT)
        t.type("/go 5\r")
        t.expect(">>> other words")
        t.expect(PROMPT)
        t.type("/sta\t\r")  # tab completes
        assert "tokens" in t.expect(PROMPT)
        t.type("/set temperature 0.5\r")
        assert "temperature 0.5" in t.expect(PROMPT)
        t.type("/set temperature -\r")
        assert "temperature 0.7" in t.expect(PROMPT)
        t.type("/set temperature hot\r")
        assert "not a number" in t.expect(PROMPT)
        t.type("/system Be kind.\r")
        assert "Be kind." in t.expect(PROMPT)
        t.type("/bogus\r")
        assert "not a command" in t.expect(PROMPT)
        t.type("/help\r")
        assert "/regen" in t.expect(PROMPT)
        t.type("/save chat.json\r")
        assert "Saved" in t.expect(PROMPT)
        t.type("/load nowhere.json\r")
        assert "Cannot read" in t.expect(PROMPT)
        t.type("/new\r")
        t.expect(PROMPT)
        t.type("/load chat.json\r")
        assert "other words" in t.expect(PROMPT)
        t.type("\x04")
        assert t.ends() == 0
    chat = json.loads((here / "chat.json").read_text())
    users = [n["content"] for n in chat["nodes"] if n["role"] == "user"]
    assert users == ["hello", "line one\nline two", "continued \nhere", "other words"]
    assert sum(n["role"] == "assistant" for n in chat["nodes"]) == 5
    assert chat["system"] == "Be kind."


def test_what_was_typed_is_there_the_next_time(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("remember me\r")
        t.expect(PROMPT)
        t.type("/exit\r")
        assert t.ends() == 0
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("\x1b[A\x1b[A")  # up: /exit, up: the message
        t.expect("remember me")


def test_ctrl_c_at_the_prompt(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)

        def interrupt():
            t.type("half a line")
            t.expect("half a line")
            t.wait_until_it_listens()
            t.type("\x03")

        interrupt()
        t.expect("Ctrl.C again")
        t.expect(PROMPT)
        t.type("hello\r")  # still there
        t.expect(PROMPT)
        interrupt()
        t.expect("Ctrl.C again")
        t.expect(PROMPT)
        interrupt()
        assert t.ends() == 130
        assert "Traceback" not in t.seen


def test_ctrl_c_stops_an_answer_and_keeps_it(demo_gguf, here):
    with Terminal("run", demo_gguf, "--plain", "--temp", "0") as t:
        t.expect(PROMPT)
        t.type("Tell me a very long story.\r")
        t.expect(r"story\.\r\n[^>]*\w+ \w+ \w+")
        t.type("\x03")
        t.expect(r"\(stopped: /continue goes on\)")
        t.expect(PROMPT)
        t.type("/save chat.json\r")
        t.expect(PROMPT)
        t.type("/exit\r")
        assert t.ends() == 0
        assert "Traceback" not in t.seen
    _, answer = json.loads((here / "chat.json").read_text())["nodes"]
    assert answer["finish_reason"] == "cancelled"
    assert len(answer["content"].split()) >= 3
    assert answer["ids"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(here, tmp_path):
    # An answer of every byte there is: the terminal must see none of the control characters.
    loud = tiny_folder(tmp_path / "loud")
    with Terminal(
        "run", loud, "--plain", "--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"
    ) as t:
        t.expect(PROMPT)
        t.type("/set max_tokens 150\r")
        t.expect(PROMPT)
        t.type("go\r")
        shown = t.expect(PROMPT).split("go\r\n", 1)[1]
        answer = shown.rsplit("\n", 1)[0]
        controls = [c for c in answer if ord(c) < 32 and c not in "\r\n\t"]
        assert controls in ([], ["\x1b"] * len(controls))  # readline's own escapes before the next prompt
        assert len(controls) <= 2


def test_no_color(here):
    with Terminal("run", "no-such-model", "hi", "--offline") as t:
        t.ends()
        assert "\x1b[31m" in t.seen
    with Terminal("run", "no-such-model", "hi", "--offline", env={"NO_COLOR": "1"}) as t:
        t.ends()
        assert "Error:" in t.seen
        assert "\x1b[" not in t.seen
