"""Painting on a terminal that is gone."""

from __future__ import annotations

import errno
import io
import os
import pty
import threading

import pytest

from tinychat.tui.output import Terminal


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("file", [Gone(), io.StringIO()], ids=["gone", "there"])
def test_textuals_writer_takes_everything_and_ends(file):
    from textual.drivers._writer_thread import MAX_QUEUED_WRITES, WriterThread

    def paint():
        writer = WriterThread(Terminal(file))
        writer.start()
        for i in range(3 * MAX_QUEUED_WRITES):
            writer.write(f"{i} ")
        writer.stop()

    thread = threading.Thread(target=paint, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert file.getvalue().startswith("" if isinstance(file, Gone) else "0 1 2 ")


def test_a_real_terminal_that_is_closed():
    ours, theirs = pty.openpty()
    terminal = Terminal(os.fdopen(theirs, "w"))
    assert terminal.isatty()
    assert terminal.fileno() == theirs
    assert terminal.write("seen") == 4
    terminal.flush()
    assert os.read(ours, 10) == b"seen"
    os.close(ours)
    assert terminal.write("not seen") == 8
    terminal.flush()
