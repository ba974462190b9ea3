"""Keys by their names: which there are, what config.toml puts in their place, and what is wrong with that."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from textual.binding import Binding, BindingType

from tinychat.base.errors import UsageError

# What a terminal can send; one character is itself.
_KEY = re.compile(
    r"((ctrl|alt|shift)\+)*"
    r"(\S|f([1-9]|1\d|2[0-4])|enter|escape|tab|space|backspace|delete|insert|home|end|pageup|pagedown|up|down"
    r"|left|right|comma|slash)"
)
_SAME = {"ctrl+m": "enter", "ctrl+i": "tab", "ctrl+h": "backspace", "ctrl+[": "escape"}
_WRITING = ("space", "backspace", "delete", "left", "right", "comma", "slash")  # they write, as characters do
_WRITING_ELSEWHERE = (
    "enter",
    "tab",
    "up",
    "down",
    "home",
    "end",
)  # these too, unless they are the composer's
# What vi keys change: g is the first message, as gg is in vi, so that going on needs another key.
VI = {"first_message": ("home", "g"), "go_on": ("o",)}


@dataclass(frozen=True)
class Group:
    """Keys of a place. `written`: characters are text there. `everywhere`: they hold in all places."""

    title: str
    bindings: tuple[Binding, ...]
    written: bool = False
    everywhere: bool = False

    @classmethod
    def of(cls, title: str, *lists: Sequence[BindingType], **how: bool) -> Group:
        """Those bindings that say what they do."""
        return cls(title, tuple(b for each in lists for b in each if isinstance(b, Binding)), **how)


class Keys:
    """The keys as they are now."""

    def __init__(self, groups: Sequence[Group], changed: Mapping[str, tuple[str, ...]]):
        """changed: keys in place of those of the bindings, by name."""
        self.groups = groups
        self.changed = {name: tuple(keys) for name, keys in changed.items()}

    def of(self, binding: Binding) -> tuple[str, ...]:
        """The keys of a binding."""
        return self.changed.get(binding.id or "") or tuple(binding.key.split(","))

    def named(self, name: str) -> str:
        """The first key of that name, for a hint."""
        key = next(self.of(b)[0] for group in self.groups for b in group.bindings if b.id == name)
        return "esc" if key == "escape" else key

    def name_of(self, title: str, key: str) -> str | None:
        """What a key does in the group of that title."""
        bindings = next(g.bindings for g in self.groups if g.title == title)
        return next((b.id for b in bindings if key in self.of(b)), None)

    def names(self) -> list[str]:
        """All names, in the order of the help."""
        return [b.id for group in self.groups for b in group.bindings if b.id]

    def rows(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """(title, [(keys, what they do)])."""
        for group in self.groups:
            yield (
                group.title,
                [(", ".join(self.of(b)), b.description) for b in group.bindings if b.description],
            )

    @property
    def keymap(self) -> dict[str, str]:
        """What Textual calls so."""
        return {name: ",".join(keys) for name, keys in self.changed.items()}


def made(
    groups: Sequence[Group],
    asked: Mapping[str, tuple[str, ...]],
    vi: bool,
    own: Mapping[str, str],
    wrong: Callable[[str, str], UsageError],
) -> Keys:
    """The keys of the groups with those that were asked for in their place.

    own: keys that editing a text needs, with what they do. wrong: the error for a name, which knows its line.
    Raises UsageError for an unknown name, for what is no key, and for a key that does something else already.
    """
    before = Keys(groups, {})
    given = {name: tuple(k.lower() if len(k) > 1 else k for k in those) for name, those in asked.items()}
    keys = Keys(groups, {**(VI if vi else {}), **given})
    for name in asked:
        group, binding = next(((g, b) for g in groups for b in g.bindings if b.id == name), (None, None))
        if group is None or binding is None:
            near = difflib.get_close_matches(name, before.names(), 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Names: {', '.join(before.names())}"
            raise wrong(name, f"{name} is the name of no key. {hint}")
        for key in keys.of(binding):
            if problem := _problem(key, group) or _collision(key, binding, group, keys, own):
                raise wrong(name, problem)
    return keys


def _problem(key: str, group: Group) -> str | None:
    if not _KEY.fullmatch(key) or key == ",":
        return f"{key!r} is no key. Write it as ctrl+s, alt+enter, f5 or pageup"
    if key in _SAME:
        return f"A terminal sends the same for {key} and {_SAME[key]}"
    writes = len(key) == 1 or key in _WRITING or (key.startswith("shift+") and len(key) == 7)
    if group.everywhere:
        writes = writes or key in _WRITING_ELSEWHERE
    if group.written and writes:
        return f"{key} is for writing there. Use it with ctrl or alt, or a function key"
    return None


def _collision(key: str, binding: Binding, group: Group, keys: Keys, own: Mapping[str, str]) -> str | None:
    if key in binding.key.split(","):
        return None
    for other in keys.groups:
        if other is not group and not (group.everywhere or other.everywhere):
            continue
        for b in other.bindings:
            if b is not binding and key in keys.of(b):
                return f"{key} is the key of {b.id or b.description} already. Give that another one"
    if group.written and key in own:
        return f"{key} is needed for writing: {own[key].lower()}. Choose another"
    return None
