"""Addresses of servers, the names of their models, and the key that one of them is given.

A served model is called ID@URL, so that a stored chat knows where it was held.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.terminal import one_line

KEY, OPENAI_KEY = "TINYCHAT_API_KEY", "OPENAI_API_KEY"  # environment variables
LONGEST_URL, LONGEST_ID, LONGEST_KEY = 500, 200, 4096  # characters
_NAME = re.compile(r"(?P<id>.*)@(?P<url>https?://[^\s@]+)", re.DOTALL)
_PATH = re.compile(r"[A-Za-z0-9._~/%!$&'()*+,;=:-]*")


@dataclass(frozen=True)
class Address:
    """The base of an OpenAI-compatible API: `http://host:8000/v1`, as `str` writes it."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """What somebody typed: a URL, or host:port. Without a path it is /v1. Raises UsageError."""
        shown = one_line(text)[:80]
        if "@" in text:
            raise UsageError(
                "The address of a server may hold no user, password or @.",
                f"Give the key in the environment variable {KEY}.",
            )
        todo = "Write it like http://localhost:8000 or https://host/v1."
        if not text or len(text) > LONGEST_URL or not text.isascii() or not text.isprintable():
            raise UsageError(f"{shown!r} is not the address of a server.", todo)
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port, host = parts.port, parts.hostname or ""
        except ValueError:
            raise UsageError(f"{shown!r} is not the address of a server.", todo) from None
        if parts.scheme not in ("http", "https"):
            raise UsageError(f"{shown} is no http or https address.", todo)
        sound = re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+(%[a-z0-9._-]+)?", host)
        if not sound or port == 0 or parts.query or parts.fragment or not _PATH.fullmatch(parts.path):
            raise UsageError(f"{shown!r} is not the address of a server.", todo)
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)

    @property
    def place(self) -> str:
        """Host, and the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, by its name."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}{self.path}"


def full_name(model: str, address: Address) -> str:
    """Name of a served model; "" is the one that the server has."""
    return f"{model}@{address}"


def split_name(name: str) -> tuple[str, Address | None]:
    """A name as (id, address); the address is None for a model of this machine."""
    if (found := _NAME.fullmatch(name)) is None:
        return name, None
    try:
        return found["id"], Address.parse(found["url"])
    except UsageError:
        return name, None


@dataclass(frozen=True)
class KeySource:
    """Where the key of one server stands: a variable of the environment or a file that were named for it."""

    address: Address
    variable: str | None = None
    file: Path | None = None

    def key(self, address: Address) -> tuple[str | None, str]:
        """Key for a server, and where it is from; None if there is none. What was named for one server is
        given to no other. Raises TinychatError; the key is in no message.
        """
        if address == self.address and self.file is not None:
            return _sound(_read(self.file), str(self.file)), str(self.file)
        if address == self.address and self.variable is not None:
            if not (key := os.environ.get(self.variable)):
                raise UsageError(f"{self.variable} is not set.", "Set that variable to the server's key.")
            return _sound(key, self.variable), self.variable
        for variable in (KEY, OPENAI_KEY):
            if variable == OPENAI_KEY and address.scheme != "https":
                break
            if key := os.environ.get(variable):
                return _sound(key, variable), variable
        return None, ""


def _sound(key: str, source: str) -> str:
    key = key.strip()
    if not re.fullmatch(rf"[!-~]{{1,{LONGEST_KEY}}}", key):
        raise UsageError(f"What stands in {source} is no key.", "A key is one word of ASCII characters.")
    return key


def _read(file: Path) -> str:
    """A file that nobody else may read."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
                raise UsageError(f"{file} is not a file of yours.", "Give a file that holds the key alone.")
            if status.st_mode & 0o077:
                raise UsageError(f"Others may read {file}, which holds a key.", f"chmod 600 {file}")
            return f.read(LONGEST_KEY + 2).decode("ascii", "replace")
    except OSError as e:
        raise TinychatError(f"The key cannot be read: {e.strerror}: {file}.", "Check that path.") from e
