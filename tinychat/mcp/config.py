"""The servers that the user has set up: `mcp.json` beside config.toml, in the form of other programs.

What stands there is run: the file must be the user's own, and nobody else may be able to write it. Files of
the working directory are never looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinychat.base import locations
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import MAX_SETTINGS, OddFileError, open_regular
from tinychat.base.terminal import one_line

TABLES = ("mcpServers", "servers")  # Claude Desktop, Cursor and most others; VS Code
FORM = 'Write {"mcpServers": {"NAME": {"command": …, "args": […]} or {"url": …}}}.'
LONGEST_NAME = 40  # characters
MOST_SERVERS = 50


@dataclass(frozen=True)
class ServerConfig:
    """A server that is a command (with its arguments and more environment variables), or has an address."""

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Digest of what is run, or of where it is: another one is another server."""
        said = [list(self.command), sorted(self.env.items()), self.cwd, self.url]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def config_file() -> Path:
    """Where it is looked for."""
    return locations.config_file().with_name("mcp.json")


def read(path: Path | None = None) -> list[ServerConfig]:
    """The servers in the file; none where there is no file. Raises TinychatError."""
    path = path or config_file()
    try:
        text = _own_text(path)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise TinychatError(f"{path} cannot be read: {e.strerror}.", "Mend it, or move it away.") from e
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise TinychatError(f"{path} is no JSON: {one_line(str(e))[:100]}.", FORM) from None
    found = [content[t] for t in TABLES if isinstance(content, dict) and isinstance(content.get(t), dict)]
    if not found:
        raise TinychatError(f"{path} names no servers.", FORM)
    servers = {name: how for table in found for name, how in table.items()}
    if len(servers) > MOST_SERVERS:
        raise TinychatError(f"{path} names {len(servers)} servers.", f"Keep {MOST_SERVERS} at most.")
    try:
        return [c for name, how in servers.items() if (c := _server(name, how)) is not None]
    except UsageError as e:
        raise TinychatError(f"{path}: {e.what}", e.todo) from None


def _own_text(path: Path) -> bytes:
    """The bytes of a file that is the user's, where nobody else can write. Raises OSError, TinychatError."""
    with open_regular(path) as f:
        about, folder = os.fstat(f.fileno()), os.stat(path.absolute().parent)
        if about.st_uid != os.geteuid() or folder.st_uid not in (0, os.geteuid()):
            raise TinychatError(
                f"{path} says what is to be run and is not yours.", "Make one of your own, or move it away."
            )
        if about.st_mode & 0o022:
            raise TinychatError(
                f"Others may write {path}, which says what is to be run.", f"chmod 600 {path}"
            )
        if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
            raise TinychatError(
                f"Others may write in the folder of {path}, which says what is to be run.",
                f"chmod o-w {path.parent}",
            )
        if about.st_size > MAX_SETTINGS:
            raise OddFileError(0, "it is too large")
        return f.read(MAX_SETTINGS)


def _server(name: str, how: Any) -> ServerConfig | None:
    """One of them; None if it is switched off."""
    shown = one_line(name)[:LONGEST_NAME]
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise UsageError(f"{shown!r} is no name of a server.", f"Use {LONGEST_NAME} characters, at most.")
    if not isinstance(how, dict):
        raise UsageError(f"{shown} is no server.", FORM)
    if how.get("disabled") is True or how.get("enabled") is False:
        return None
    kind = how.get("type", how.get("transport"))
    if kind == "sse":
        raise UsageError(
            f"{shown} speaks SSE, which MCP has given up.", "Give its streamable HTTP address, or remove it."
        )
    url, command = how.get("url", how.get("serverUrl")), how.get("command")
    if (url is None) == (command is None):
        raise UsageError(f"{shown} needs a command or a url.", FORM)
    if url is not None:
        if not isinstance(url, str) or not url.isprintable() or not _is_web(url):
            raise UsageError(f"The url of {shown} is no http or https address.", FORM)
        return ServerConfig(name, url=url, headers=_texts(how, "headers", shown))
    arguments, cwd = how.get("args", []), how.get("cwd")
    words: list[Any] = [command, *arguments] if isinstance(arguments, list) else [None]
    if not all(isinstance(w, str) and "\0" not in w for w in words) or not command:
        raise UsageError(f"The command of {shown} is no text with a list of texts behind it.", FORM)
    if cwd is not None and (not isinstance(cwd, str) or "\0" in cwd):
        raise UsageError(f"The cwd of {shown} is no path.", FORM)
    return ServerConfig(name, tuple(words), _texts(how, "env", shown), cwd)


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _texts(how: dict[str, Any], key: str, shown: str) -> dict[str, str]:
    given = how.get(key) or {}
    if not isinstance(given, dict) or not all(isinstance(v, (str, int, float)) for v in given.values()):
        raise UsageError(f"The {key} of {shown} are no texts by their names.", FORM)
    texts = {k: str(v) for k, v in given.items()}
    if any("\0" in t or "\n" in t or "=" in k or not k for k, v in texts.items() for t in (k, v)):
        raise UsageError(f"The {key} of {shown} hold what cannot be passed on.", FORM)
    return texts
