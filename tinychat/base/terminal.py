"""The way to a terminal. Models, files and servers are strangers: what they wrote is text there, never an
instruction. A pipe gets everything as it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from tinychat.base.characters import make_printable

if TYPE_CHECKING:
    from rich.console import Console

# Escape sequences lose their ESC and are read as text; nothing here may move the cursor, change the
# direction of what follows, or be invisible.
_HARMLESS: dict[int, str | None] = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"}
_HARMLESS |= {0x0D: None, 0x7F: "␡", 0x2028: "\n", 0x2029: "\n", 0xFEFF: None}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_HARMLESS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x2070), *range(0xFFF9, 0xFFFC)), None)
_HARMLESS |= dict.fromkeys(range(0xE0000, 0xE0080), None)
_HARMLESS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_SUSPECT = re.compile(
    # The flag of a country's part (🏴, tags, an end) is the one honest use of tags.
    "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_COLOURS = re.compile("\x1b\\[[0-9;:]*m")


def clean(text: str) -> str:
    """Without anything that a terminal could take for an instruction; what was there stays visible.

    Marks of right-to-left writing (U+200E, U+200F, U+061C) and joiners stay: they turn or hide nothing else.
    """
    return _SUSPECT.sub(_harmless, text) if _SUSPECT.search(text) else text


def _harmless(found: re.Match) -> str:
    return found[0] if len(found[0]) > 1 else _HARMLESS[ord(found[0])] or ""


def one_line(text: str) -> str:
    """The text cleaned and on one line, so that it cannot pretend to be the line that follows it."""
    return " ".join(clean(text).split())


class Guard:
    """A terminal's text stream that takes no instructions: colours are left out, what else could be one is
    shown as text. What we style ourselves is written to `raw`, in the same order.
    """

    def __init__(self, raw: IO[str]):
        self.raw = raw

    def write(self, text: str) -> int:
        """Writes like a file; returns the number of characters."""
        shown = text
        if not text.isascii() or not text.isprintable():
            shown = clean(_COLOURS.sub("", text))
        self.raw.write(shown)
        return len(text)

    def writelines(self, lines) -> None:
        """Writes several texts like a file."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # ways around
            raise AttributeError(name)
        return getattr(self.raw, name)

    def __iter__(self):
        return iter(self.raw)


def guard() -> None:
    """Put a Guard before stdout and stderr where they are terminals. Whatever is written can be written, in
    every encoding.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Guard):
            continue
        make_printable(stream)
        if stream.isatty():
            setattr(sys, name, Guard(stream))


def raw(stream: IO[str]) -> IO[str]:
    """Stream for styled text of our own: past the Guard, if there is one."""
    return stream.raw if isinstance(stream, Guard) else stream


def color() -> bool | None:
    """False where the user wants none (no-color.org), else None: as the terminal has it."""
    return False if os.environ.get("NO_COLOR") else None


def label(text: str, colour: str, *, err: bool = False) -> None:
    """Write a word of ours, in colour on a terminal, without a line's end."""
    import click

    stream = raw(sys.stderr if err else sys.stdout)
    click.echo(click.style(text, fg=colour), file=stream, nl=False, color=color())


def faint(text: str) -> None:
    """Write somebody's text to stdout, fainter than the rest on a terminal that has colours."""
    import click

    stream = raw(sys.stdout)
    click.echo(click.style(clean(_COLOURS.sub("", text)), dim=True), file=stream, nl=False, color=color())


def console(*, err: bool = False, width: int | None = None) -> Console:
    """A rich Console for our tables and bars. The texts in them are cleaned and hold no markup."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable, options=None):
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else clean(text), style, control)

    return CleanConsole(
        file=raw(sys.stderr if err else sys.stdout),
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
    )


@contextmanager
def bar(label: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal's stderr, gone at its end. Yields `update(done, total, label)`, of which
    the last two may be left out.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn()
    # What others write meanwhile would be read for colours and links, if rich were to write it.
    to = console(err=True)
    with Progress(
        *columns, console=to, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as shown:
        task = shown.add_task(one_line(label), total=total)

        def update(done: int, total: int | None = None, label: str | None = None) -> None:
            changes: dict[str, Any] = {} if total is None else {"total": total}
            if label is not None:
                changes["description"] = one_line(label)
            shown.update(task, completed=done, **changes)

        yield update
