"""Prompts that the user keeps: files `prompts/NAME.md` beside config.toml, with `{{input}}` where words go.

+++
system = "You are a careful reviewer."     optional, as are all of these
model = "qwen3-4b"                         for `tinychat run -p NAME`
sampling.temperature = 0.2
+++
Review this change, the worst first:

{{input}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import MAX_SETTINGS, read_text
from tinychat.base.preferences import Reader, Section

INPUT = re.compile(r"\{\{\s*input\s*\}\}")
FENCE = "+++"


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read. `sampling`: checked values by field."""

    name: str
    text: str
    system: str | None = None
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> Section:
        """Its settings, to be laid over those of config.toml."""
        return Section(self.system, self.sampling)

    def filled(self, words: str | None) -> str:
        """The text with the words in it, or behind it where it has no place for them.

        Raises UsageError where it has one and there are none.
        """
        words = (words or "").strip("\n")
        if not words and INPUT.search(self.text):
            raise UsageError(
                f"The prompt {self.name} wants words.", "Give them behind its name, or pipe them in."
            )
        if not INPUT.search(self.text):
            return f"{self.text}\n\n{words}" if words else self.text
        return INPUT.sub(lambda _: words, self.text)


def folder() -> Path:
    """Where the prompts are."""
    return locations.config_file().with_name("prompts")


def names() -> list[str]:
    """The prompts that there are, in alphabetical order."""
    try:
        return sorted(p.stem for p in folder().glob("*.md") if p.stem.isprintable())
    except OSError:
        return []


def find(name: str) -> Prompt:
    """The prompt of that name. Raises UsageError where there is none, or where it is damaged."""
    path = folder() / f"{name}.md"
    if not name or Path(name).name != name or "\0" in name:
        raise UsageError(f"{name!r} is no name of a prompt.", f"Use one of {folder()}.")
    try:
        text = read_text(path, MAX_SETTINGS)
    except FileNotFoundError:
        known = ", ".join(names()) or "none yet"
        raise UsageError(f"There is no prompt {name}.", f"Write {path}. Known: {known}.") from None
    except (OSError, TinychatError, ValueError) as e:
        said = getattr(e, "strerror", None) or getattr(e, "what", None) or "it is not UTF-8"
        raise UsageError(f"{path} cannot be read: {said}.", "Mend it, or remove it.") from e
    settings, body = _parts(path, text)
    found = Reader(path, settings).prompt()
    if not body.strip():
        raise UsageError(f"{path} says nothing.", "Write what is to be asked below its settings.")
    return Prompt(name, body.strip("\n"), found.general.system, found.model, found.general.sampling)


def _parts(path: Path, text: str) -> tuple[str, str]:
    """The settings and the text. Settings keep their lines' numbers: an empty line stands for the fence."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0].strip() != FENCE:
        return "", "\n".join(lines)
    for n, line in enumerate(lines[1:], 1):
        if line.strip() == FENCE:
            return "\n".join(["", *lines[1:n]]), "\n".join(lines[n + 1 :])
    raise UsageError(f"{path}, line 1: its settings have no end.", f"Close them with a line {FENCE}.")
