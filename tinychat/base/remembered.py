"""What tinychat remembers by itself from run to run, in `settings.json` in TINYCHAT_HOME: the theme, and the
model used last. What the user sets stands in config.toml and holds in its place.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.base.files import read_text, write_atomically


def settings_file() -> Path:
    """Where it stands."""
    return locations.home() / "settings.json"


def recall(path: Path | None = None) -> dict[str, Any]:
    """All of it; empty where there is none, or something else."""
    try:
        content = json.loads(read_text(path or settings_file()))
    except (OSError, ValueError, RecursionError, TinychatError):
        return {}
    return content if isinstance(content, dict) else {}


def remember(path: Path | None = None, **facts: Any) -> None:
    """Add facts to it. A home that cannot be written remembers nothing."""
    path = path or settings_file()
    before = recall(path)
    if {**before, **facts} == before:
        return
    with suppress(OSError, TinychatError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**before, **facts}).encode())
