"""Output that the screen is painted on."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import IO, Any

from tinychat.base.characters import make_printable


def paintable() -> IO[str]:
    """The stream that leads to the terminal: stderr, or stdout where stderr goes to a file."""
    stream: IO[str] | None = sys.__stderr__
    if stream is None or not stream.isatty():
        stream = sys.__stdout__ or sys.stdout
    make_printable(stream)
    return stream


class Terminal:
    """A terminal that may be closed at any moment. Textual's writing thread ends with the first error; who
    paints then waits for ever, and the program with it. Here what nobody can see any more is dropped.
    """

    def __init__(self, file: IO[str]):
        self._file = file

    def write(self, text: str) -> int:
        """Write like a file; returns the number of characters."""
        with suppress(OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush like a file."""
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
