"""Picture on the terminal while Textual is still being imported: an empty chat, within a tenth of a second.

Keys typed meanwhile stay in the terminal's buffer, without echo; Textual reads them when it starts.
"""

from __future__ import annotations

import os
import shutil
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinychat.tui.output import Terminal, paintable

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[?1049l\x1b[?25h"


@contextmanager
def first_frame() -> Iterator[None]:
    """Show the frame. Afterwards the terminal's modes are as before; its picture stays, unless something
    failed: then it is as before, too.
    """
    out, tty = Terminal(paintable()), 0 if sys.__stdin__ is None else sys.__stdin__.fileno()
    before = None
    try:
        with suppress(termios.error):  # a terminal that is gone, or is none
            before = termios.tcgetattr(tty)
            quiet = termios.tcgetattr(tty)
            quiet[3] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(tty, termios.TCSANOW, quiet)
        out.write(ENTER + frame(*usual_size()))
        out.flush()
        yield
    except BaseException:
        out.write(LEAVE)
        out.flush()
        raise
    finally:
        if before is not None:
            with suppress(termios.error):
                termios.tcsetattr(tty, termios.TCSANOW, before)


def usual_size() -> tuple[int, int]:
    """Columns and lines of the terminal; 80 × 24 where it has none, which Python says itself since 3.11."""
    size = shutil.get_terminal_size()
    return size.columns or 80, size.lines or 24


def frame(width: int, height: int) -> str:
    """The empty composer and its status line, where the real ones will be."""
    dim, normal = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[0m")
    margin = "" if width < 90 else "  "
    inner = max(0, width - 2 * len(margin) - 2)
    lines = [
        f"{margin}╭{'─' * inner}╮",
        f"{margin}│{' ' * inner}│",
        f"{margin}╰{'─' * inner}╯",
        "   starting",
    ]
    return (
        dim
        + "".join(f"\x1b[{max(1, height - 3 + i)};1H{line[:width]}" for i, line in enumerate(lines))
        + normal
    )
