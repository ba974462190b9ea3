"""The slash commands: one table for the composer, its completion, the command palette and the help screen."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams


@dataclass(frozen=True)
class Command:
    """`/name argument`. `keys`: what does the same."""

    name: str
    argument: str
    help: str
    needs_argument: bool = False


COMMANDS = (
    Command("help", "", "keys and commands"),
    Command("model", "[NAME]", "choose the model"),
    Command("system", "[TEXT]", "set the system prompt; nothing shows it; - removes it"),
    Command("set", "[NAME VALUE]", f"sampling: {', '.join(SamplingParams.numbers())}"),
    Command("regen", "", "answer again, as a new branch"),
    Command("continue", "", "go on with the last answer, where it was stopped or cut"),
    Command("edit", "[TEXT]", "change your last message, as a new branch"),
    Command("branch", "[N]", "go to branch N of the last answer; without N, the next one"),
    Command("tree", "", "all branches of this chat; enter goes to one"),
    Command("go", "N", "go to branch N of the tree", True),
    Command("new", "", "a new chat"),
    Command("clear", "", "a new chat"),
    Command("resume", "[TEXT]", "find an earlier chat"),
    Command("rename", "TITLE", "name this chat", True),
    Command("delete", "", "delete this chat; /undo brings it back"),
    Command("undo", "", "bring back the chat deleted last (of this week); again: the one before"),
    Command("save", "FILE", "export this chat: .md for reading, .json for Session.load", True),
    Command("copy", "[code|chat]", "copy the last answer, its last code block, or the chat"),
    Command("think", "", "open or fold the last reasoning"),
    Command("stats", "", "speed over this chat, memory, bandwidth"),
    Command("prompt", "NAME [TEXT]", "send a prompt of your own, prompts/NAME.md beside config.toml", True),
    Command("default", "", "have new chats begin as this one: its model, system prompt and sampling"),
    Command("mcp", "[on|off|forget NAME]", "MCP servers: their tools, and what you allow"),
    Command("theme", "[dark|light|contrast]", "colours"),
    Command("exit", "", "leave"),
)
BY_NAME = {c.name: c for c in COMMANDS} | {
    alias: c for c in COMMANDS for alias in {"exit": ("bye", "quit")}.get(c.name, ())
}


def split(text: str) -> tuple[str, str] | None:
    """("set", "top_k 3") of "/set top_k 3"; None if it is not a command (a path, several lines)."""
    if not text.startswith("/") or "\n" in text.strip():
        return None
    name, _, rest = text[1:].strip().partition(" ")
    if not name or "/" in name:
        return None
    return name.lower(), rest.strip()


def unknown(name: str) -> UsageError:
    """The error for what is no command, with those that it may mean."""
    begun = [n for n in BY_NAME if name and (name.startswith(n) or n.startswith(name))]
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, BY_NAME, 3, 0.5)]))[:3]
    hint = f"Did you mean /{' or /'.join(near)}? " if near else ""
    return UsageError(f"/{name} is not a command.", f"{hint}/help lists them.")


def complete(text: str) -> list[Command]:
    """Commands that begin like `text` ("/re"), while their name is being typed."""
    if not text.startswith("/") or any(c.isspace() for c in text):
        return []
    return [c for c in COMMANDS if c.name.startswith(text[1:].lower())]


def prompt_begun(text: str) -> str | None:
    """The beginning of a prompt's name that is being typed behind /prompt; None elsewhere."""
    command, space, name = text.partition(" ")
    return name if command == "/prompt" and space and not any(c.isspace() for c in name) else None
