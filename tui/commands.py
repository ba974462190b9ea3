"""The slash commands: one table for the composer, its completion, the command palette and the help screen."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams


@dataclass(frozen=True)
class Command:
    """`/name argument`. `plain`: what it does without a screen, where that differs; `screen`: why it
    needs one.
    """

    name: str
    argument: str
    help: str
    needs_argument: bool = False
    plain: str = ""
    screen: str = ""


COMMANDS = (
    Command("help", "", "keys and commands", plain="this list"),
    Command("model", "[NAME]", "choose the model", plain="which model answers, or another one"),
    Command("system", "[TEXT]", "show and change the system prompt, or set it; - removes it"),
    Command("set", "[NAME VALUE]", f"sampling: {', '.join(SamplingParams.numbers())}"),
    Command("regen", "", "answer again, as a new branch"),
    Command("continue", "", "go on with the last answer, where it was stopped or cut"),
    Command(
        "compact",
        "",
        "go on from a summary, which the model writes; the whole chat stays, as a branch",
    ),
    Command(
        "edit",
        "[TEXT]",
        "change your last message, as a new branch",
        plain="say TEXT in place of your last message",
    ),
    Command("branch", "[N]", "go to branch N of the last answer; without N, the next one"),
    Command("tree", "", "all branches of this chat; enter goes to one", plain="all branches of this chat"),
    Command("go", "N", "go to branch N of the tree", True),
    Command("new", "", "a new chat"),
    Command("clear", "", "a new chat"),
    Command("resume", "[TEXT|ID]", "find an earlier chat, or open one by its number"),
    Command("rename", "[TITLE]", "name this chat"),
    Command("delete", "", "delete this chat; /undo brings it back"),
    Command("undo", "", "bring back the chat deleted last (of this week); again: the one before"),
    Command("save", "FILE", "export this chat: .md for reading, .json for Session.load", True),
    Command("load", "FILE", "go on with a conversation that was saved as .json", True),
    Command(
        "copy",
        "[code|chat]",
        "copy the last answer, its last code block, or the chat",
        screen="select and copy in the terminal",
    ),
    Command("think", "", "open or fold the last reasoning", plain="the last reasoning"),
    Command(
        "stats",
        "",
        "speed over this chat, memory, bandwidth",
        plain="timings of the last answer, context used",
    ),
    Command("prompt", "NAME [TEXT]", "send a prompt of your own, prompts/NAME.md beside config.toml", True),
    Command("default", "", "have new chats begin as this one: its model, system prompt and sampling"),
    Command("mcp", "[on|off|forget NAME]", "MCP servers: their tools, and what you allow"),
    Command("theme", "[dark|light|contrast]", "colours", screen="colours are the terminal's own here"),
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
