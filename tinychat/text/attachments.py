"""Files that a message brings along: kept beside what was said, put together for the model in this one place.

An attachment is `{"name", "text"}`, as it is stored and sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def as_read(said: str, attachments: Iterable[dict[str, str]]) -> str:
    """The message as the model reads it: each file under its name in a fence, then what was said."""
    parts = []
    for a in attachments:
        fence = fence_of(a["text"])
        parts.append(f"{a['name']}:\n{fence}\n{a['text'].rstrip()}\n{fence}")
    if said.strip():
        parts.append(said)
    return "\n\n".join(parts)


def fence_of(text: str) -> str:
    """A fence of Markdown that nothing in a text ends."""
    return "`" * (max(map(len, re.findall(r"`{3,}", text)), default=2) + 1)


def are_sound(value: Any) -> bool:
    """Whether that is a list of attachments: for what comes from a file."""
    return isinstance(value, list) and all(
        isinstance(a, dict) and a.keys() == {"name", "text"} and all(isinstance(v, str) for v in a.values())
        for a in value
    )
