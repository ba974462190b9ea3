"""What completes a command's argument: the same on the screen and line by line."""

from __future__ import annotations

from contextlib import suppress

from tinychat.base import prompts
from tinychat.base.errors import TinychatError
from tinychat.base.sampling_params import SamplingParams
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.outline import outline
from tinychat.conversation import Tree
from tinychat.tui.attachments import complete_path
from tinychat.tui.commands import BY_NAME, complete

MOST = 40  # that are offered
Offer = tuple[str, str]  # what is put in, and what of it is shown
WORDS = {"theme": ("dark", "light", "contrast"), "copy": ("code", "chat")}


def begun_argument(text: str) -> tuple[str, str] | None:
    """The command and the argument that is being typed behind it; None elsewhere."""
    name, space, rest = text.partition(" ")
    if not space or "\n" in text or not name.startswith("/") or name[1:] not in BY_NAME:
        return None
    return BY_NAME[name[1:]].name, rest


def arguments(name: str, begun: str, store: ChatStore, tree: Tree) -> list[Offer]:
    """What the argument of a command may become; nothing where it is whole already."""
    found = _offers(name, begun, store, tree)
    return [] if [value for value, _ in found] == [begun] else found[:MOST]


def lines(line: str, store: ChatStore, tree: Tree) -> list[str]:
    """Whole lines that a line may become: commands, their arguments, files behind an @."""
    if found := complete(line):
        return [f"/{c.name}{' ' if c.argument else ''}" for c in found]
    if (typed := begun_argument(line)) is not None:
        command = line[: len(line) - len(typed[1])]
        return [command + value for value, _ in arguments(*typed, store, tree)]
    before, at, fragment = line.rpartition("@")
    if at and not fragment.count(" "):
        return [f"{before}@{name}" for name in complete_path(fragment)]
    return []


def _offers(name: str, begun: str, store: ChatStore, tree: Tree) -> list[Offer]:
    if name in ("save", "load"):
        return _same(complete_path(begun))
    if " " in begun:
        return []
    if name == "prompt":
        return _begin(_same(prompts.names()), begun)
    if name == "set":
        return _begin(_same(SamplingParams.numbers()), begun)
    if name in WORDS:
        return _begin(_same(WORDS[name]), begun)
    if name == "model":
        return _models(begun)
    if name == "go":
        return _begin([(str(b.number), f"{b.number}  {b.words}") for b in outline(tree)], begun)
    if name == "resume":
        with suppress(TinychatError):  # pressing tab is no moment for an error
            return _begin([(str(c.id), f"{c.id}  {c.title}") for c in store.chats()], begun)
    return []


def _models(begun: str) -> list[Offer]:
    """Models that are here or known by name; with a slash or a dot, files and folders."""
    from tinychat.hub import store

    if "/" in begun or begun.startswith((".", "~")):
        return _same(n for n in complete_path(begun) if n.endswith(("/", ".gguf")))
    with suppress(TinychatError, OSError):
        return _begin(_same(n for n in store.known_names() if n.isprintable()), begun)
    return []


def _same(values) -> list[Offer]:
    return [(value, value) for value in values]


def _begin(offers: list[Offer], begun: str) -> list[Offer]:
    return [offer for offer in offers if offer[0].startswith(begun)]
