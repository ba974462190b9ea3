"""Whatever a terminal sends is an event or nothing, and never the end."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual import events

from tinychat.tui.keyboard import LARGEST, MOST_PASTE, Keyboard

SCREEN = [sys.executable, str(Path(__file__).parent / "open_screen.py")]


def heard(*chunks, end=False):
    """Events of these chunks and a pause; keys as what they type, or else as their name."""
    keyboard, found = Keyboard(), []
    for chunk in chunks:
        found += keyboard.feed(chunk)
    found += keyboard.end_paste() if end else keyboard.rest()
    return [
        (e.character if e.is_printable else e.key) if isinstance(e, events.Key) else e for e in found
    ]  # fmt: skip


def test_bytes_that_are_no_utf8_are_typed_as_latin1():
    assert "".join(heard(b"caf\xe9 au")) == "café au"
    assert "".join(heard("é漢".encode()[:3], "é漢".encode()[3:])) == "é漢"
    assert heard(b"\x90\xff") == ["\ufffd", "ÿ"]


@pytest.mark.parametrize(
    ("sequence", "key"),
    [
        (b"\x1b\r", "alt+enter"),  # tmux, xterm and most others
        (b"\x1b\n", "alt+enter"),
        (b"\x1b[13;3u", "alt+enter"),
        (b"\x1b[27;3;13~", "alt+enter"),
        (b"\x1b[27;2;13~", "shift+enter"),
        (b"\x1b[27;5;13~", "ctrl+enter"),
        (b"\x1b[27;9;13~", None),
    ],
)
def test_enter_with_others_is_one_key_however_it_is_sent(sequence, key):
    if key is not None:
        assert heard(b"a", sequence, b"b") == ["a", key, "b"]
    for i in range(1, len(sequence)):
        found = heard(b"a" + sequence[:i], sequence[i:] + b"b")
        assert found == (["a", key, "b"] if key else heard(b"a" + sequence + b"b"))
    assert heard(b"\x1b") == ["escape"]


def test_mouse_reports_of_the_old_kind_are_the_mouse():
    down, moved, key = heard(b"\x1b[M \xc3\xa9", b"\x1b[M#\xc3\xa9x")  # the position would be the letter é
    assert (type(down), down.x, down.y, down.button) == (events.MouseDown, 0xC3 - 33, 0xA9 - 33, 1)
    assert (type(moved), key) == (events.MouseMove, "x")
    (late,) = heard(b"\x1b[M", b" !", b"!")
    assert (late.x, late.y) == (0, 0)


@pytest.mark.parametrize(
    ("sequence", "kept"),
    [
        (b"\x1b[1;1;99999999u", []),  # no such character
        (b"\x1b[97:a;1u", None),
        (b"\x1b[55296u", ["\ufffd"]),  # a surrogate
        (b"\x1b[48;0;0;0;0t", []),  # a terminal of no size
        (b"\x1b[<0;99999999999999999999;1M", []),
        (b"\x1b]11;rgb:0000/0000/0000\x1b\\", []),  # replies: colours, the clipboard, a version, a setting
        (b"\x1b]52;c;cm0gLXJmCg==\x07", []),
        (b"\x1bP>|tmux 3.4\x1b\\", []),
        (b"\x1b_Gi=1;OK\x1b\\", []),
        (b"\x1b[" + b"1;" * 5000, None),
        (b"\0\0\0", None),
    ],
)
def test_a_sequence_that_means_nothing_is_nothing(sequence, kept):
    found = heard(sequence, b"z")
    assert found[-1] == "z"
    assert kept is None or found[:-1] == kept
    assert not any(isinstance(e, events.Key) and "\ud800" <= str(e) <= "\udfff" for e in found)


def test_a_size_is_one_that_can_be_painted():
    (resized,) = heard(b"\x1b[48;99999999;99999999;1;1t")
    assert tuple(resized.size) == LARGEST


def test_a_paste_is_one_event_whatever_is_in_it_and_wherever_it_is_cut():
    content = b"a\x1b[31mb\r\x1b\rcaf\xe9\x1b[200~\x1b[20\0"
    whole = b"\x1b[200~" + content + b"\x1b[201~z"
    for at in range(len(whole)):
        paste, key = heard(whole[:at], whole[at:])
        assert paste.text == "a\x1b[31mb\r\x1b\rcafé\x1b[200~\x1b[20"
        assert key == "z"


def test_a_paste_without_an_end_is_bounded_and_ends():
    chunk = b"x" * (1 << 20)
    (paste,) = heard(b"\x1b[200~", *[chunk] * (MOST_PASTE // len(chunk) + 3), end=True)
    assert len(paste.text) == MOST_PASTE


def test_escape_and_what_follows_late_are_two_keys():
    keyboard = Keyboard()
    assert list(keyboard.feed(b"\x1b")) == []
    assert keyboard.waits
    assert [e.key for e in keyboard.rest()] == ["escape"]
    assert [e.character for e in keyboard.feed(b"[A")] == ["[", "A"]
    assert heard(b"\x1b", b"[A") == ["up"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [b"\x1b", b"\x1b[", b"\x1b[M", b"\x1b[200~", b"\x1b[201~", b"\x1b]", b"\x1bP", b"\xff;9u"]
        ),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_no_bytes_end_it_and_none_of_its_text_is_half_a_character(chunks, chance):
    keyboard = Keyboard()
    for chunk in chunks:
        found = list(keyboard.feed(chunk))
        if chance.random() < 0.3:
            found += keyboard.rest()
        if chance.random() < 0.1:
            found += keyboard.end_paste()
        for event in found:
            if isinstance(event, (events.Key, events.Paste)):
                text = event.text if isinstance(event, events.Paste) else (event.character or "") + event.key
                text.encode()
    found = [*keyboard.end_paste(), *keyboard.rest(), *keyboard.feed(b"\x18z"), *keyboard.rest()]
    assert getattr(found[-1], "character", None) == "z"


class Screen:
    """The chat screen on a bare pseudo-terminal, which sends what no terminal would."""

    def __init__(self, home, size=(30, 100), command=SCREEN, **environment):
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color", "TINYCHAT_HOME": str(home), **environment}
        for name in ("COLUMNS", "LINES"):
            env.pop(name, None)
        env = {k: v for k, v in env.items() if v}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        self.out = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def read(self, seconds=0.0):
        while select.select([self.fd], [], [], seconds)[0]:
            try:
                self.out += os.read(self.fd, 1 << 16)
            except OSError:
                return
            seconds = 0.0

    def wait(self, condition, seconds=30.0):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.out[-3000:]
            assert self.process.poll() is None, self.out[-3000:]
            self.read(0.05)

    def send(self, data):
        while data:
            self.read()
            if select.select([], [self.fd], [], 0.05)[1]:
                data = data[os.write(self.fd, data[:256]) :]

    def ends(self):
        while self.process.poll() is None:
            self.read(0.05)
        self.read()
        return self.process.returncode


def noise(seed, rounds):
    """Bytes, half of them of sequences; without what would leave, stop or suspend the program by its keys."""
    chance = random.Random(seed)
    pieces = [
        b"\x1b[",
        b"\x1b[<",
        b"\x1b]",
        b"\x1bP",
        b"\x1b[M",
        b"\x1b[200~",
        b"\x1b[201~",
        b"u",
        b";",
        b"~",
    ]
    for _ in range(rounds):
        out = bytearray()
        for _ in range(chance.randrange(60)):
            if chance.random() < 0.4:
                out += chance.choice(pieces)
            else:
                out.append(chance.choice([chance.randrange(256), 48 + chance.randrange(10), 0x1B]))
        yield bytes(out).translate(None, b"\x03\x07\x0d\x10\x11\x1a")


def survives(home, seed, rounds):
    with Screen(home) as screen:
        screen.wait(lambda: b"ready" in screen.out)
        for data in noise(seed, rounds):
            screen.send(data)
        screen.send(b"\x1b[201~\x18")
        for _ in range(4):
            screen.send(b"\x1b")
            screen.read(0.4)
        screen.wait(lambda: screen.read(0.3) or not select.select([screen.fd], [], [], 0.3)[0])
        screen.send(b"\x11")
        assert screen.ends() == 0, screen.out[-3000:]
        assert b"Traceback" not in screen.out


def test_a_screen_survives_noise(tmp_path):
    survives(tmp_path, 1, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_screen_survives_much_noise(tmp_path, seed):
    survives(tmp_path, seed, 600)


@pytest.mark.parametrize(
    ("size", "environment"),
    [
        ((0, 0), {"TERM": ""}),
        ((1, 1), {"TERM": "vt52"}),
        ((30, 100), {"PYTHONIOENCODING": "ascii", "TERM": "linux"}),
        ((30, 100), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": ""}),
    ],
    ids=["no size, no TERM", "one cell", "ascii", "C locale"],
)
def test_whatever_the_terminal_is_an_answer_comes_and_is_kept(tmp_path, size, environment):
    from tinychat.chats.chat_store import ChatStore

    with Screen(tmp_path, size, **environment) as screen:
        screen.wait(lambda: b"ready" in screen.out or (size == (1, 1) and (tmp_path / "chats.db").exists()))
        screen.send("caf\udce9 漢字\r".encode("utf-8", "surrogateescape"))
        store = ChatStore(tmp_path / "chats.db")
        screen.wait(lambda: any(m.finish_reason for c in store.chats() for m in store.messages(c.id)))
        if size == (30, 100):
            screen.wait(lambda: b"echo" in screen.out)
        screen.send(b"\x11")
        assert screen.ends() == 0
        if "PYTHONIOENCODING" in environment:
            assert b"|" in screen.out
            assert b"\\u" not in screen.out
            screen.out.replace(b"\x1b", b"").decode("ascii")
    assert [m.content for m in store.messages(1)] == ["café 漢字", "echo: café 漢字"]
    store.close()
