"""The branches of a conversation as a list that a person can read: where each begins, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinychat.base.errors import UsageError
from tinychat.conversation import Message, Tree

RAILS = 8  # levels whose lines are drawn; a branch that lies deeper tells how deep
LOOKED_AT = 400  # characters of a message that its first words are taken from


@dataclass(frozen=True)
class Branch:
    """Messages that follow each other without an alternative, from `start` to `end` (places in the tree)."""

    number: int  # in the order of the list, from 1
    start: int
    end: int
    depth: int  # how many branches it lies within
    rails: tuple[bool, ...]  # the innermost levels, its own last: whether another branch follows there
    messages: int
    on_path: bool  # whether the present branch of the conversation leads through it
    is_question: bool
    words: str
    model: str  # of its first answer; empty where it has none
    rate: float  # tokens a second of that answer; 0 where unknown


def outline(tree: Tree) -> list[Branch]:
    """Every branch, depth first, older ones first: a branch comes before those that grew from it."""
    children: dict[int | None, list[int]] = {}
    for i, m in enumerate(tree.nodes):
        children.setdefault(m.parent, []).append(i)
    path = set(tree.path())
    out: list[Branch] = []
    roots = children.get(None, [])
    waiting: list[tuple[int, int, tuple[bool, ...]]] = [(i, 0, (i != roots[-1],)) for i in reversed(roots)]
    while waiting:
        start, depth, rails = waiting.pop()
        run = [start]
        while len(following := children.get(run[-1], [])) == 1:
            run.append(following[0])
        out.append(_branch(tree, len(out) + 1, run, depth, rails, path))
        for i in reversed(following):
            waiting.append((i, depth + 1, (*rails, i != following[-1])[-RAILS:]))
    return out


def _branch(
    tree: Tree, number: int, run: list[int], depth: int, rails: tuple[bool, ...], path: set[int]
) -> Branch:
    first = tree.nodes[run[0]]
    answer = next((m for i in run if (m := tree.nodes[i]).role == "assistant"), None)
    rate = answer.stats.get("decode_tps") if answer is not None else None
    return Branch(
        number,
        run[0],
        run[-1],
        depth,
        rails,
        len(run),
        run[0] in path,
        first.role == "user",
        first_words(first),
        (answer.model or "") if answer is not None else "",
        float(rate or 0.0),
    )


def first_words(m: Message) -> str:
    """The beginning of a message on one line; of an answer what it says, not what it thought before."""
    if m.role == "user":
        return m.title() or "(empty)"
    thought, text = m.split()
    said = " ".join((text[:LOOKED_AT] if text.strip() else (thought or "")[:LOOKED_AT]).split())
    return said.lstrip("#*`>-_ ") or "(empty)"


def here(branches: list[Branch]) -> Branch | None:
    """The branch at whose end the conversation is."""
    return next((b for b in reversed(branches) if b.on_path), None)


def numbered(tree: Tree, text: str) -> Branch:
    """The branch that a number means. Raises UsageError."""
    branches = outline(tree)
    if not branches:
        raise UsageError("There are no branches yet.", "Say something first.")
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= len(branches):
        raise UsageError(
            f"There is no branch {text or 'without a number'}.",
            f"/tree shows the branches; use /go 1 to {len(branches)}.",
        )
    return branches[number - 1]


def go(tree: Tree, branch: Branch, switch: Callable[[int], None]) -> None:
    """Make that branch part of the present one. Where it is already, the conversation stays at its end."""
    if not branch.on_path:
        switch(branch.start)
