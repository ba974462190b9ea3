"""Flags that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem

from tinychat.base.load_options import ANSWER, CONTEXT, ENGINE, LoadOptions
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Biases, Choice, Flag, Gigabytes, Number, Setting, Settings, Texts, Whole
from tinychat.base.terminal import one_line

DEFAULT_MODEL = "smollm2-135m"


def _stack(options: list[Callable]) -> Callable:
    def decorate(f: Callable) -> Callable:
        for option in reversed(options):
            f = option(f)
        return f

    return decorate


class Name(click.Path):
    """A path that can be one: no NUL in it, and characters that the file system has. Gives a `Path`."""

    def __init__(self, **limits: Any):
        super().__init__(path_type=Path, **limits)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert as click.Path does; a usage error for what is no name."""
        try:
            if not value or b"\0" in os.fsencode(value):
                self.fail(f"{value!r} is not the name of a file.", param, ctx)
        except UnicodeEncodeError:
            self.fail(f"{value!r} is not the name of a file.", param, ctx)
        return super().convert(value, param, ctx)


def file_type() -> Name:
    """The type of an argument that names a file to be read."""
    return Name(exists=True, dir_okay=False)


CHAT_NUMBER = click.IntRange(1, (1 << 63) - 1)


class Size(click.ParamType):
    """Bytes: `4GB`, `500 MB`, `1.5GiB`, or a plain number."""

    name = "size"
    UNITS: ClassVar[dict[str, int]] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Convert to bytes; a usage error otherwise."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", value.strip().lower())
        if not found or (found[3] and not found[2]):
            self.fail(f"{value!r} is not a size. Write 500MB or 4GB.", param, ctx)
        unit = self.UNITS[found[2]]
        if found[3]:
            unit = 1 << (10 * "kmgt".index(found[2]) + 10)
        size = float(found[1]) * unit
        if size > 1 << 62:
            self.fail(f"{value[:20]!r} is more than any disk has.", param, ctx)
        return int(size)


class GpuMemory(click.ParamType):
    """GB, as `Size` where a unit stands behind; or "auto"."""

    name = "auto|GB"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert to GB; a usage error otherwise."""
        if not isinstance(value, str) or value == "auto":
            return value
        try:
            number = float(value) if value[-1:].isdigit() else Size().convert(value, param, ctx) / 1e9
        except ValueError:
            number = 0.0
        if not 0 < number <= Gigabytes.MOST:
            self.fail(f"{value!r} is no amount of memory. Write GB, such as 8 or 7.5, or auto.", param, ctx)
        return number


def complete_models(ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
    """Shell completion of models: installed ones and aliases; with a slash or a dot, folders and files. A
    shell shows what it is given, and reads it line by line; so names that are not plain text are left out.
    """
    from tinychat.hub import store

    if ctx is not None and param is not None and ctx.params.get(param.name) and param.nargs == -1:
        return []  # the words behind the model are a prompt
    if "/" in incomplete or incomplete.startswith((".", "~")):
        return [CompletionItem(incomplete, type="file")]
    with suppress(Exception):  # pressing tab is no moment for an error
        names = [n for n in store.known_names() if n.startswith(incomplete) and n.isprintable()]
        return [CompletionItem(n) for n in names] or [CompletionItem(incomplete, type="file")]
    return []


def complete_drafts(ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
    """Shell completion of who drafts."""
    own = [CompletionItem(n) for n in ("auto", "ngram", "none") if n.startswith(incomplete)]
    return own + complete_models(None, None, incomplete)


def complete_chats(_ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
    """Shell completion of chats by their numbers, with their titles."""
    from tinychat.chats.chat_store import ChatStore

    with suppress(Exception):
        store = ChatStore()
        try:
            found = [c for c in store.chats() if str(c.id).startswith(incomplete)]
        finally:
            store.close()
        return [CompletionItem(str(c.id), help=one_line(c.title)) for c in found]
    return []


model_argument = click.argument("model", shell_complete=complete_models)


class Finite(click.FloatRange):
    """A number in a range, and not NaN."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Convert as click.FloatRange does."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class OneOf(click.Choice):
    """One of some whole numbers."""

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Convert as click.Choice does, to a number."""
        return int(super().convert(str(value), param, ctx))


def _option(name: str, s: Setting) -> Callable:
    """The command line's option for a setting. It is None where it is not given."""
    flag = s.flag or f"--{name.replace('_', '-')}"
    words: dict[str, Any] = {"help": s.sentence() or None, "metavar": s.metavar}
    if name == "draft":
        words["shell_complete"] = complete_drafts
    if isinstance(s, Flag) and s.default is None:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", name, default=None, **words)
    if isinstance(s, Flag):
        return click.option(flag, name, is_flag=True, default=None, **words)
    return click.option(flag, name, type=_type(s), multiple=isinstance(s, (Biases, Texts)), **words)


def _type(s: Setting) -> click.ParamType:
    if s.unit == "bytes":
        return Size()
    if isinstance(s, Gigabytes):
        return GpuMemory()
    if isinstance(s, Whole):
        return click.IntRange(int(s.low), None if s.high is None else int(s.high))
    if isinstance(s, Number):
        return Finite(s.low, s.high)
    if isinstance(s, Choice):
        return (OneOf if s.numbers else click.Choice)([str(c) for c in s.choices])
    return click.STRING


def options_of(kind: type[Settings], names: Iterable[str]) -> Callable:
    """A decorator that gives a command the options of these settings."""
    return _stack([_option(name, kind.SETTINGS[name]) for name in names])


sampling_options = options_of(SamplingParams, SamplingParams.SETTINGS)
answering_options = options_of(LoadOptions, LoadOptions.group(ANSWER))
loading_options = options_of(LoadOptions, LoadOptions.group(CONTEXT, ENGINE))


def pick(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The keyword arguments among `names` that were given."""
    return {k: options[k] for k in names if options.get(k) not in (None, ())}
