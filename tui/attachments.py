"""Text files that a message brings along: `@path` in the composer, and long pastes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tinychat.base import locations
from tinychat.base.files import read_bytes

MOST_BYTES = 4_000_000
_MENTION = re.compile(r"(?:^|(?<=\s))@(?:\"([^\"\n]+)\"|(\S+))")


@dataclass
class Attachment:
    """A file or a paste: `problem` says why it cannot be sent."""

    name: str
    text: str
    problem: str = ""
    tokens: int | None = None

    @classmethod
    def of(cls, stored: dict[str, str]) -> Attachment:
        """One that was sent before."""
        return cls(stored["name"], stored["text"])

    def stored(self) -> dict[str, str]:
        """Form in which messages keep it."""
        return {"name": self.name, "text": self.text}

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.text.encode("utf-8", "replace"))


def mentions(text: str) -> list[tuple[str, Path]]:
    """The @paths in a text that name a file, as (what is written, path)."""
    out = []
    for match in _MENTION.finditer(text):
        written = match[1] or match[2]
        path = locations.written(written)
        try:
            if path.is_file():
                out.append((match[0], path))
        except (OSError, ValueError):
            continue
    return out


def read(path: Path) -> Attachment:
    """A text file as an attachment."""
    try:
        data = read_bytes(path, MOST_BYTES)
    except OSError as e:
        return Attachment(path.name, "", e.strerror or str(e))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Attachment(path.name, "", "not a UTF-8 text file")
    if "\0" in text:
        return Attachment(path.name, "", "not a text file")
    return Attachment(path.name, text)


def complete_path(fragment: str, limit: int = 40) -> list[str]:
    """File names that begin like `fragment` (after the @), folders with a slash."""
    head, tail = os.path.split(fragment)
    folder = locations.written(head) if head else Path()
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(tail) or (
                    entry.name.startswith(".") and not tail.startswith(".")
                ):
                    continue
                name = os.path.join(head, entry.name) + ("/" if entry.is_dir() else "")
                if name.isprintable():
                    found.append(name)
                if len(found) >= 400:
                    break
    except (OSError, ValueError):
        return []
    return sorted(found)[:limit]
