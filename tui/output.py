"""What the screen is painted on."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, Any


class Terminal:
    """A terminal that may be closed at any moment. Textual's writing thread ends with the first error; who
    paints then waits for ever, and the program with it. Here what nobody can see any more is dropped.
    """

    def __init__(self, file: IO[str]):
        self._file = file

    def write(self, text: str) -> int:
        """As a file's; the number of characters."""
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
