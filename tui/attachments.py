"""Text files that a message brings along: `@path` in the composer, and long pastes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinychat.base import locations
from tinychat.base.files import read_bytes

MOST_BYTES = 4_000_000
BEGINNING = 8192  # bytes in which a binary file shows that it is one
SUFFIXES = re.compile(  # of names that mean files, where nothing else says so
    r"\.(c|cc|cpp|cfg|conf|cs|css|csv|cu|diff|docx|go|h|hpp|html?|ini|ipynb|java|jpe?g|jsx?|jsonl?|kt|log|lua|md"
    r"|odt|patch|pdf|php|png|py|rb|rs|rst|sh|sql|swift|tex|toml|tsx?|tsv|txt|xml|ya?ml|zip)",
    re.IGNORECASE,
)
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
    return [(written, path) for written, path, kind in _named(text) if kind == "file"]


def missed(text: str, at: int | None = None) -> list[tuple[str, Path]]:
    """The @paths that mean a file and do not name one: folders, what is not there, no regular files.

    at: where one writes; what ends there is not written yet.
    """
    return [
        (written, path)
        for written, path, kind in _named(text, at)
        if kind == "odd" or (kind == "missing" and _means_a_file(written[1:]))
    ]


def _named(text: str, at: int | None = None) -> Iterator[tuple[str, Path, str]]:
    """What is written, the path, and what that is: "file", "missing", or "odd" for something else."""
    for match in _MENTION.finditer(text):
        name = match[1] or match[2]
        bare = name if match[1] else name.rstrip(",;:.!?)")  # a sentence may go on behind it
        path = locations.written(name)
        kind = _kind(path)
        if kind == "missing" and bare and bare != name:
            path = locations.written(bare)
            kind = _kind(path)
        if kind == "file" or match.end() != at:
            yield match[0] if match[1] or path == locations.written(name) else f"@{bare}", path, kind


def _kind(path: Path) -> str:
    try:
        return "file" if path.is_file() else "odd" if path.exists() else "missing"
    except (OSError, ValueError):
        return "missing"


def _means_a_file(written: str) -> bool:
    """Whether a word behind an @ that names nothing was meant to: not so names of people, decorators and
    packages.
    """
    if written.startswith(('"', "./", "../", "~/", "/")):
        return True
    return SUFFIXES.fullmatch(Path(written).suffix) is not None


def read(path: Path) -> Attachment:
    """A text file as an attachment."""
    try:
        if path.is_dir():
            return Attachment(path.name or str(path), "", "a folder: name a file in it")
        data = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        return Attachment(str(path), "", "there is no such file")
    except (OSError, ValueError) as e:
        return Attachment(path.name, "", getattr(e, "strerror", None) or str(e))
    if b"\0" in data[:BEGINNING]:
        return Attachment(path.name, "", "binary, not a text file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Attachment(path.name, "", "not a UTF-8 text file")
    if "\0" in text:
        return Attachment(path.name, "", "binary, not a text file")
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
