"""Licences with terms of their own (Gemma's, Llama's, gated ones): what is said when a model
is pulled that has one.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinychat.base.files import open_regular

# Hugging Face's names of licences that allow what people do with a model without further terms.
FREE = {
    "apache-2.0", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "unlicense", "wtfpl", "zlib", "artistic-2.0", "ms-pl", "afl-3.0", "ncsa", "odc-by", "bsl-1.0",
}  # fmt: skip
TEXTS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY)([.-][\w.-]*)?", re.IGNORECASE)
LINES, CHARACTERS = 40, 4000  # of a text that are shown
MAX_TEXT = 1 << 20


def has_terms(license: str | None, gated: bool = False) -> bool:
    """Whether a licence (Hugging Face's name for it) is one to be read."""
    return gated or (license is not None and license.strip().lower() not in FREE)


def notice(name: str, license: str | None, link: str | None, folder: Path) -> str:
    """Notice on a pulled model whose licence has terms: where they are, and how they begin."""
    known = license if license not in (None, "other") else "a licence of its own"
    files = sorted(f for f in folder.iterdir() if f.is_file() and TEXTS.fullmatch(f.name))
    lines = [f"{name} comes with terms ({known}); using it is agreeing to them."]
    for file in files:
        text = _printable(file)
        shown = "\n".join(text[:CHARACTERS].splitlines()[:LINES]).strip()
        lines += ["", shown, f"… the whole text: {file}" if len(shown) < len(text.strip()) else f"({file})"]
    if not files:
        lines.append(f"Read them: {link or 'its own page has them'}")
    return "\n".join(lines)


def _printable(file: Path) -> str:
    """The file's text without what could speak to a terminal."""
    with open_regular(file) as f:
        text = f.read(MAX_TEXT).decode("utf-8", "replace")
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
