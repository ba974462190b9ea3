"""A conversation: the tree of messages that sessions, the store, the screen, exports and the engine's
protocol share.

A new field of a message is a line in `Message`; the store needs a column for it (`chats/database.py`,
`chats/records.py`). Loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tinychat.base import arguments, shapes
from tinychat.text.attachments import are_sound, as_read
from tinychat.text.reasoning import split_thought

FORMAT = 1  # of saved conversations
ROLES = ("user", "assistant", "tool")
REASONS = ("stop", "length", "cancelled", "context_full", "error", "tool_calls", "repeating")
TITLE_LENGTH = 60
LATEST = 4102444800.0  # the year 2100: what a clock may say at most
# How a field leaves: always, only where something is in it (so that earlier versions read the file if not),
# or never.
SOMETIMES, NEVER = {"written": "sometimes"}, {"written": "never"}


@dataclass
class Message:
    """A node of the conversation's tree. An assistant's also keeps the ids of its prompt's new part and of
    its answer. `content` is what it wrote, its reasoning included: `split` tells them apart. Calls of tools
    are no part of it: they are `tool_calls`, and `written` is all of it as the model wrote it. What a call
    gave is a message of the role "tool", behind the answer that has the call.

    An answer without a `finish_reason` is being written, or was when its program ended.
    """

    role: str
    content: str
    parent: int | None = None  # its place in the tree
    prompt_text: str = ""  # what the template added since the previous answer, guards included
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    attachments: list[dict[str, str]] = field(default_factory=list, metadata=SOMETIMES)  # name and text
    tool_calls: list[dict[str, Any]] = field(default_factory=list, metadata=SOMETIMES)  # in OpenAI's form
    tool_call_id: str = field(default="", metadata=SOMETIMES)  # of the call whose result this is
    written: str = field(default="", metadata=SOMETIMES)  # the answer with its calls, where it has some
    model: str | None = field(default=None, metadata=NEVER)  # whose ids these are, in the store
    created: float = field(default=0.0, metadata=NEVER)  # seconds since 1970, in the store

    def as_read(self) -> str:
        """Text that the model reads: the files, then what was said."""
        return as_read(self.content, self.attachments) if self.attachments else self.content

    def split(self) -> tuple[str | None, str]:
        """The reasoning (None: there is none) and the text."""
        if self.role != "assistant":
            return None, self.as_read()
        return split_thought(self.content, self.prompt_text)[:2]

    def title(self) -> str:
        """Title of a chat that begins with this message: the first words, on one line."""
        said = self.content if self.content.strip() else ", ".join(a["name"] for a in self.attachments)
        line = " ".join(said.split())
        return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"

    def for_model(self, name: str) -> Message:
        """The message as a conversation with that model has it: ids of another one mean nothing to it."""
        known = replace(self, model=None, created=0.0)
        if self.model != name:
            known.forget_ids()
        return known

    def forget_ids(self) -> None:
        """Leave only words: the ids, and how a model spelled them, mean nothing to another one."""
        self.ids, self.prompt_ids, self.prompt_text, self.written = [], [], "", ""

    @property
    def whole(self) -> str:
        """All that an answer's ids say, calls included."""
        return self.written or self.content

    # As JSON

    def as_dict(self) -> dict[str, Any]:
        """The fields that are written, for JSON; lists are not copied."""
        out = {}
        for name, how in _written(type(self)):
            value = getattr(self, name)
            if value or how != "sometimes":
                out[name] = value
        return out

    @classmethod
    def from_dict(cls, given: Any, *, strangers: bool = False) -> Message:
        """Read what `as_dict` gave. Raises ValueError for whatever is no message; strangers: see
        `shapes.read`.
        """
        m = shapes.read(cls, given, strangers=strangers)
        if m.role not in ROLES:
            raise ValueError("role")
        if not are_sound(m.attachments):
            raise ValueError("attachments")
        if not arguments.are_calls(m.tool_calls):
            raise ValueError("tool_calls")
        return m

    @classmethod
    def mended(cls, given: dict[str, Any]) -> Message:
        """A message of whatever a damaged row had in its fields: one that makes no sense is empty."""
        out = {}
        for name, (reader, needed) in shapes.readers(cls).items():
            try:
                out[name] = reader(given.get(name), False)
            except ValueError:
                if needed:
                    out[name] = ""
        m = cls(**out)
        if m.role not in ROLES:
            m.role = "assistant" if m.model or m.ids or m.finish_reason is not None else "user"
        if m.finish_reason is not None and m.finish_reason not in REASONS:
            m.finish_reason = "error"
        m.stats = {k: v for k, v in m.stats.items() if is_number(v) or (k == "given_up" and are_losses(v))}
        m.created = float(m.created) if is_number(m.created) and 0 <= m.created <= LATEST else 0.0
        if not are_sound(m.attachments):
            m.attachments = []
        if not arguments.are_calls(m.tool_calls):
            m.tool_calls = []
        for ids in (m.ids, m.prompt_ids):
            if ids and min(ids) < 0:
                ids.clear()
        return m


_WRITTEN: dict[type, tuple[tuple[str, str], ...]] = {}


def _written(cls: type[Message]) -> tuple[tuple[str, str], ...]:
    """Names of the fields of a message that are written, and when."""
    if (known := _WRITTEN.get(cls)) is not None:
        return known
    how = ((f.name, f.metadata.get("written", "always")) for f in fields(cls))
    _WRITTEN[cls] = tuple((name, when) for name, when in how if when != "never")
    return _WRITTEN[cls]


def is_number(value: Any) -> bool:
    """Whether that is a finite number of at most 64 bits, and no bool."""
    return type(value) in (int, float) and abs(value) < 1 << 63  # which NaN and infinity are not


def are_losses(value: Any) -> bool:
    """Whether that is `Stats.given_up`: pairs of tokens that are gone, and of how many."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(type(n) is int for n in pair)
        and 0 <= pair[0] <= pair[1] < 1 << 31
        for pair in value
    )


class Tree:
    """Messages, a parent before its children, and the leaf of the present branch. A message is known by its
    place in `nodes`, which only grows.
    """

    def __init__(self, nodes: Iterable[Message] = (), leaf: int | None = None):
        self.nodes, self.leaf = list(nodes), leaf

    @classmethod
    def of_path(cls, path: Iterable[Message]) -> Tree:
        """A conversation without branches: each message answers the one before."""
        nodes = [replace(m, parent=i - 1 if i else None) for i, m in enumerate(path)]
        return cls(nodes, len(nodes) - 1 if nodes else None)

    def path(self, leaf: int | None = None) -> list[int]:
        """Places from the first message to `leaf` (default: the present one)."""
        at = self.leaf if leaf is None else leaf
        out = []
        while at is not None:
            out.append(at)
            at = self.nodes[at].parent
        return out[::-1]

    def messages(self, leaf: int | None = None) -> list[Message]:
        """The messages along `path`."""
        return [self.nodes[i] for i in self.path(leaf)]

    def siblings(self, node: int) -> list[int]:
        """The alternatives at a place (regenerated answers, edited messages), oldest first, it among them."""
        parent, role = self.nodes[node].parent, self.nodes[node].role
        return [i for i, m in enumerate(self.nodes) if m.parent == parent and m.role == role]

    def branches(self) -> list[tuple[int, list[int]]]:
        """Each place of the present branch, with its `siblings`."""
        by_place: dict[tuple[int | None, str], list[int]] = {}
        for i, m in enumerate(self.nodes):
            by_place.setdefault((m.parent, m.role), []).append(i)
        return [(i, by_place[self.nodes[i].parent, self.nodes[i].role]) for i in self.path()]

    def last(self, role: str) -> int | None:
        """The newest message of that role on the present branch."""
        return next((i for i in reversed(self.path()) if self.nodes[i].role == role), None)

    @property
    def question(self) -> int | None:
        """What the last answer of the present branch answers, or the next one will: a message of the user, or
        the result of a call.
        """
        if self.leaf is None or self.nodes[self.leaf].role != "assistant":
            return self.leaf
        return self.nodes[self.leaf].parent

    def append(self, message: Message) -> int:
        """Say more: the message is the present leaf. An edited question has the parent of the one that it
        replaces, an answer that is given again that of the one before. The place of it.
        """
        self.nodes.append(message)
        self.leaf = len(self.nodes) - 1
        return self.leaf

    def switch(self, node: int) -> None:
        """Make the branch through `node` the present one, down to its newest leaf."""
        newest = {m.parent: i for i, m in enumerate(self.nodes)}
        while node in newest:
            node = newest[node]
        self.leaf = node

    def asked(self, node: int | None) -> int | None:
        """The message of the user that led to a node, which may be it itself."""
        while node is not None and self.nodes[node].role != "user":
            node = self.nodes[node].parent
        return node

    def called(self, node: int) -> dict[str, Any] | None:
        """The call whose result a node is."""
        at: int | None = node
        while at is not None and self.nodes[at].role == "tool":
            at = self.nodes[at].parent
        calls = self.nodes[at].tool_calls if at is not None else []
        return next((c for c in calls if c["id"] == self.nodes[node].tool_call_id), None)

    def unanswered(self) -> list[dict[str, Any]]:
        """Calls at the end of the present branch that have no result yet."""
        at, given = self.leaf, set()
        while at is not None and self.nodes[at].role == "tool":
            given.add(self.nodes[at].tool_call_id)
            at = self.nodes[at].parent
        return [] if at is None else [c for c in self.nodes[at].tool_calls if c["id"] not in given]

    # As JSON

    def as_dict(self, model: str, system: str | None, params: dict[str, Any]) -> dict[str, Any]:
        """Fields that `Session.save`, `/save` and exports write, and `Session.load` reads."""
        return {
            "tinychat_session": FORMAT,
            "model": model,
            "system": system,
            "params": params,
            "leaf": self.leaf,
            "nodes": [m.as_dict() for m in self.nodes],
        }

    @classmethod
    def from_dict(cls, given: Any) -> Saved:
        """A saved conversation. Raises ValueError for whatever is not one."""
        if not isinstance(given, dict) or given.get("tinychat_session") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        saved = shapes.read(Saved, {k: v for k, v in given.items() if k != "tinychat_session"})
        nodes = []
        for i, node in enumerate(saved.nodes):
            try:
                m = Message.from_dict(node)
            except ValueError as e:
                raise ValueError(f"message {i}: {e}") from None
            if not (m.parent is None or 0 <= m.parent < i):
                raise ValueError(f"message {i}: parent")
            nodes.append(m)
        if saved.leaf is not None and not 0 <= saved.leaf < len(nodes):
            raise ValueError("leaf")
        saved.tree = cls(nodes, saved.leaf)
        return saved


@dataclass
class Saved:
    """A saved conversation as it was read: `tree` has its nodes and leaf."""

    model: str
    system: str | None
    params: dict[str, Any]
    leaf: int | None
    nodes: list[Any]
    tree: Tree = field(default_factory=Tree, init=False)


def mend_parents(parents: Sequence[tuple[int, int | None]], roles: Sequence[str]) -> list[int | None]:
    """Places of the parents of messages that have numbers of their own, given as (number, its parent's).

    A parent that is not there, or comes later, is replaced by the message after which this one makes sense.
    """
    places: dict[int, int] = {}
    out: list[int | None] = []
    for at, (number, parent) in enumerate(parents):
        place = None if parent is None else places.get(parent)
        if parent is not None and place is None:
            place = next((i for i in range(at - 1, -1, -1) if roles[i] != roles[at]), None)
        out.append(place)
        places[number] = at
    return out
