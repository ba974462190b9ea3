"""Tools of servers as a model and a user see them, and what their results come to as text.

Everything here was written by strangers: names, descriptions, schemas and results are bounded, and hold no
control characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.base import tools as checked_tools
from tinychat.base.characters import whole
from tinychat.base.errors import UsageError
from tinychat.base.terminal import clean, one_line

LONGEST_DESCRIPTION = 4096  # characters that the model is told
LONGEST_SCHEMA = 1 << 15  # characters, as JSON
LONGEST_RESULT, SHORTEST_RESULT = 1 << 16, 2000  # characters of one that a model reads
MOST_TOOLS = 128  # of a server
MOST_AT_ONCE, LONGEST_AT_ONCE = checked_tools.MOST_TOOLS, checked_tools.LONGEST_SCHEMAS // 2  # of all servers
LONGEST_NAME = 64  # what most models were trained with


@dataclass(frozen=True)
class Tool:
    """A tool of a server.

    called    what the model calls it: its own name, or with its server's where another one has that too
    digest    of the server's command, and of all that the server says of the tool: where that changes, what
              was allowed is allowed no more
    """

    server: str
    name: str
    called: str
    description: str
    schema: dict[str, Any]
    digest: str

    @property
    def where(self) -> str:
        """SERVER/TOOL, as a user names it."""
        return f"{one_line(self.server)}/{one_line(self.name)}"

    def as_openai(self) -> dict[str, Any]:
        """As a model is told of it."""
        function = {"name": self.called, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Listed:
    """A tool as its server lists it."""

    name: str
    description: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a call gave, as the model is told; `failed`: the tool or its server says that it went wrong."""

    text: str
    failed: bool = False


def read_listed(name: str, description: str | None, schema: Any) -> Listed | None:
    """A tool that can be offered to a model; None for what is too large or makes no sense."""
    try:
        if not 0 < len(name) <= 200 or len(json.dumps(schema)) > LONGEST_SCHEMA:
            return None
        parameters = {k: v for k, v in schema.items() if k != "$schema"}
        parameters.setdefault("properties", {})
        about = clean(whole(description or ""))[:LONGEST_DESCRIPTION]
        (tool,) = checked_tools.tools(
            [{"name": "x", "description": about, "parameters": _harmless(parameters)}]
        )
        return Listed(whole(name), about, tool["function"]["parameters"])
    except (UsageError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def named(listed: Iterable[tuple[str, str, Sequence[Listed]]]) -> list[Tool]:
    """The tools, each with a name that no other one has, as many as a model can be told of.

    listed: (server, its identity, its tools).
    """
    flat = [(server, identity, tool) for server, identity, tools in listed for tool in tools[:MOST_TOOLS]]
    bare = [_name(tool.name) for _, _, tool in flat]
    times = Counter(bare)
    out: list[Tool] = []
    taken: set[str] = set()
    length = 0
    for (server, identity, tool), name in zip(flat, bare, strict=True):
        if times[name] > 1:
            name = _name(f"{server}_{tool.name}")
        called, n = name, 2
        while called in taken:
            called, n = f"{name[: LONGEST_NAME - 4]}_{n}", n + 1
        taken.add(called)
        said = json.dumps([identity, server, tool.name, tool.description, tool.schema], sort_keys=True)
        length += len(said)
        if len(out) == MOST_AT_ONCE or length > LONGEST_AT_ONCE:
            break
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        out.append(Tool(server, tool.name, called, tool.description, tool.schema, digest))
    return out


def result_of(content: Iterable[Any], structured: Any = None, failed: bool = False) -> Result:
    """The text of a result's parts; what is no text is named."""
    parts = []
    for part in content:
        kind = getattr(part, "type", "")
        if kind == "text":
            parts.append(part.text)
            continue
        inner = getattr(part, "resource", part)
        if isinstance(text := getattr(inner, "text", None), str):
            parts.append(text)
            continue
        about = getattr(inner, "mime_type", None) or getattr(inner, "uri", None) or "of no kind"
        parts.append(f"[{one_line(str(kind))[:40]}: {one_line(str(about))[:200]}, which is not shown]")
    if not parts and structured is not None:
        parts.append(json.dumps(structured, ensure_ascii=False, default=str))
    text = "\n".join(parts)
    if failed:
        text = f"Error: {text}"
    return Result(clean(whole(text)), failed)


def cut(text: str, context: int) -> str:
    """As much of a result as a context of that many tokens (0: unknown) can bear: a quarter of it, about."""
    most = max(SHORTEST_RESULT, min(LONGEST_RESULT, context or LONGEST_RESULT))
    if len(text) <= most:
        return text
    return f"{text[:most]}\n(cut: the result has {len(text):,} characters, and these are the first {most:,})"


def _name(text: str) -> str:
    """The text as a name that every model's syntax can spell."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text).lstrip("-")[:LONGEST_NAME] or "tool"


def _harmless(value: Any) -> Any:
    """A schema whose texts hold no control characters."""
    if isinstance(value, str):
        return clean(whole(value))
    if isinstance(value, dict):
        return {clean(whole(k)): _harmless(v) for k, v in value.items()}
    return [_harmless(v) for v in value] if isinstance(value, list) else value
