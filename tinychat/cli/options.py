"""Flags that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import click

DEFAULT_MODEL = "smollm2-135m"

LOADING = (
    "device",
    "threads",
    "act_bits",
    "head_bits",
    "ctx",
    "kv_bits",
    "kv_budget",
    "kv_policy",
    "kv_disk_budget",
    "quantize",
    "offline",
)
DRAFTING = ("draft", "draft_tokens")
ANSWERING = (*LOADING, *DRAFTING, "think")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed", "stop")


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
        """As click.Path's; a usage error for what is no name."""
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
        """To bytes; a usage error otherwise."""
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


def complete_models(_ctx, _param, incomplete: str) -> list[str]:
    """Shell completion of model names: installed ones and aliases. A shell shows what it is given, and reads
    it line by line; so names that are not plain text are left out.
    """
    from tinychat.hub import store

    with suppress(Exception):  # pressing tab is no moment for an error
        return [n for n in store.known_names() if n.startswith(incomplete) and n.isprintable()]
    return []


model_argument = click.argument("model", shell_complete=complete_models)

loading_options = _stack(
    [
        click.option("--ctx", type=click.IntRange(1), help="Tokens the context holds."),
        click.option(
            "--kv-budget", type=click.IntRange(1), help="Tokens kept in the cache; others are given up."
        ),
        click.option(
            "--kv-policy",
            type=click.Choice(["h2o", "window", "none"]),
            help="What is given up: what is attended to least, the oldest, or nothing.",
        ),
        click.option(
            "--kv-disk-budget",
            type=Size(),
            help="What the caches of stored chats may take on disk, such as 500MB; default 4GB, 0: nothing.",
        ),
        click.option("--kv-bits", type=click.Choice(["16", "8"]), default="16", help="Bits of the KV cache."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "reference"]), default="auto"),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads."),
        click.option(
            "--act-bits", type=click.Choice(["16", "8"]), help="Activation bits of the CPU kernels."
        ),
        click.option("--head-bits", type=click.Choice(["8", "16"]), default="8", help="Output head bits."),
        click.option(
            "--quantize",
            type=click.Choice(["auto", "rtn", "none"]),
            default="auto",
            help="How weights stored in 16 bits run.",
        ),
        click.option("--offline", is_flag=True, help="Never use the network."),
    ]
)

sampling_options = _stack(
    [
        click.option("--temp", "temperature", type=float, help="Temperature; 0 is greedy."),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--min-p", type=float),
        click.option("--repeat-penalty", type=float),
        click.option("--max-tokens", type=click.IntRange(0)),
        click.option("--seed", type=click.IntRange(0), help="Same seed, same text."),
        click.option(
            "--stop", multiple=True, help="End the answer at this text; may be given several times."
        ),
    ]
)


answering_options = _stack(
    [
        click.option("--draft", metavar="MODEL|ngram|auto|none", help="Who drafts; the text stays the same."),
        click.option("--draft-tokens", type=click.IntRange(0, 15), help="Draft this many, always."),
        click.option("--think/--no-think", default=None, help="Whether the model reasons before it answers."),
    ]
)


def pick(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The given keyword arguments among `names`, bits as numbers."""
    out = {k: options[k] for k in names if options.get(k) is not None}
    for bits in ("act_bits", "head_bits", "kv_bits"):
        if bits in out:
            out[bits] = int(out[bits])
    return out
