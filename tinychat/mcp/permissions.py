"""What the user has allowed for good, and what never: kept in a file, each for one tool as it is now."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from tinychat.base import locations
from tinychat.base.errors import TinychatError
from tinychat.base.files import open_regular, write_atomically
from tinychat.mcp.tools import Tool

ALWAYS, NEVER = "always", "never"
MOST = 1 << 20  # bytes


class Permissions:
    """`of` says what holds for a tool: "always", "never", or None where the user is to be asked. A tool whose
    description, schema or server's command has changed is another one.

    for_now: tools as SERVER/TOOL that this run may call without asking.
    """

    def __init__(self, path: Path | None = None, for_now: tuple[str, ...] = ()):
        self.path = path or locations.home() / "mcp-allowed.json"
        self._for_now = set(for_now)
        self._kept = self._read()

    def of(self, tool: Tool) -> str | None:
        """What holds for it."""
        if tool.where in self._for_now:
            return ALWAYS
        kept = self._kept.get(tool.where)
        return kept["answer"] if kept is not None and kept["digest"] == tool.digest else None

    def keep(self, tool: Tool, answer: str) -> None:
        """What the user has said holds from here on. Raises TinychatError where it cannot be kept; then it
        holds for this run.
        """
        self._for_now.discard(tool.where)
        self._kept[tool.where] = {"digest": tool.digest, "answer": answer}
        self._write()

    def forget(self, where: str | None = None) -> int:
        """Ask again for SERVER/TOOL, for all tools of SERVER, or (None) for all; how many those were."""
        gone = [
            w
            for w in {*self._kept, *self._for_now}
            if where is None or w == where or w.startswith(f"{where}/")
        ]
        for w in gone:
            self._kept.pop(w, None)
            self._for_now.discard(w)
        if gone:
            self._write()
        return len(gone)

    def _read(self) -> dict[str, dict[str, str]]:
        """What the file says; nothing where it is not the user's own alone, or makes no sense."""
        with suppress(OSError, ValueError, RecursionError), open_regular(self.path) as f:
            about = os.fstat(f.fileno())
            if about.st_uid == os.geteuid() and not about.st_mode & 0o022:
                kept = json.loads(f.read(MOST))
                return {k: v for k, v in kept.items() if _is_sound(v)} if isinstance(kept, dict) else {}
        return {}

    def _write(self) -> None:
        try:
            write_atomically(self.path, json.dumps(self._kept, indent=1).encode())
        except TinychatError as e:
            raise TinychatError(e.what, f"What you said holds until the chat ends. {e.todo}") from e


def _is_sound(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"digest", "answer"}
        and isinstance(value["digest"], str)
        and value["answer"] in (ALWAYS, NEVER)
    )
