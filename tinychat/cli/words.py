"""Words for a model: which argument they are, what is piped in, and what stands in files."""

from __future__ import annotations

import difflib
import json
import os
import select
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from tinychat.base.characters import whole
from tinychat.base.errors import UsageError
from tinychat.base.files import MAX_TEXT, read_prose
from tinychat.cli.options import DEFAULT_MODEL
from tinychat.process.address import split_name

PATIENCE = 1.0  # seconds until it is said that stdin is being waited for


def model_or_prompt(word: str, resumed: bool, served: bool = False) -> tuple[str | None, str | None]:
    """A single argument of `run` as (model, prompt), one of them None. `served`: the model is a server's, and
    any word may be one.

    What can be a model is one, unless a chat goes on: it knows its model, so only a model that is on this
    machine or an alias is taken for one. Text with a space is a prompt, and so is what has no Latin letter or
    digit, as models' names have. Raises ModelNotFoundError for any other word.
    """
    from tinychat.hub import store

    if not word.strip():
        return None, None
    if split_name(word)[1] is not None or (served and not resumed and len(word.split()) == 1):
        return word, None
    if served:
        return None, word
    if store.is_known(word) if resumed else store.is_name(word):
        return word, None
    if resumed or len(word.split()) > 1 or not any(c.isascii() and c.isalnum() for c in word):
        return None, word
    error = store.not_found(word)
    raise type(error)(
        error.what, f"{error.todo}. To say it: tinychat run {DEFAULT_MODEL} {shlex.quote(word)}"
    )


def model_and_prompt(
    words: tuple[str, ...], resumed: bool, served: bool = False
) -> tuple[str | None, str | None]:
    """The arguments of `run` as (model, prompt), each None where it is not there.

    Several words are a model and a prompt where the first one can be a model. Where it cannot, all of them
    are the prompt, unless that may be a mistake: the first one looks like a model's name, or what follows was
    quoted. Raises ModelNotFoundError for such a first word.
    """
    from tinychat.hub import store

    if not words:
        return None, None
    first, rest = words[0], " ".join(words[1:])
    if len(words) == 1:
        return model_or_prompt(first, resumed, served)
    if not first.strip():
        return None, rest
    if served or split_name(first)[1] is not None or store.is_name(first):
        return first, rest
    if resumed or len(first.split()) > 1:
        return None, " ".join(words)
    quoted = any(len(word.split()) > 1 for word in words[1:])
    if quoted or not first.isalpha() or _is_like_a_name(first, store.known_names()):
        error = store.not_found(first)
        to_say = f"tinychat run {DEFAULT_MODEL} {shlex.quote(' '.join(words))}"
        raise type(error)(error.what, f"{error.todo}. To say it: {to_say}")
    return None, " ".join(words)


def _is_like_a_name(word: str, names: list[str]) -> bool:
    low = word.lower()
    return any(n.lower().startswith(low) for n in names) or bool(
        difflib.get_close_matches(low, names, 1, 0.6)
    )


def attached(files: tuple[Path, ...]) -> list[dict[str, str]]:
    """Text files as attachments. Raises UsageError for what is none."""
    return [{"name": whole(f.name), "text": read_prose(f)} for f in files]


def schema_of(given: str, alone: bool) -> dict[str, Any]:
    """The form of the JSON schema that was given, as such or as the name of a file; alone: whether it is for
    one answer.

    Raises UsageError.
    """
    from tinychat.text.response_format import of_schema

    if not alone:
        raise UsageError(
            "--schema is for one answer.", 'Give a prompt: tinychat run MODEL "…" --schema FILE.'
        )
    text = given if given.lstrip()[:1] in ("{", "[") else read_prose(Path(given))
    of_schema(text)  # says now what is wrong with it
    return {"type": "json_schema", "json_schema": {"schema": json.loads(text)}}


def is_json(text: str) -> bool:
    """Whether an answer is a value of JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def gather(prompt: str | None, files: tuple[Path, ...] = ()) -> str | None:
    """Files, then stdin, then the prompt, as they are; None when there is none of them."""
    parts = [read_prose(f) for f in files]
    if not sys.stdin.isatty():
        try:
            piped = _piped().decode("utf-8")
        except UnicodeDecodeError as e:
            raise UsageError("What is piped in is not UTF-8 text.", "Pipe text.") from e
        if piped.strip():
            parts.append(piped)
    if prompt:
        parts.append(whole(prompt))
    return "\n\n".join(p.strip("\n") for p in parts) if parts else None


def _piped() -> bytes:
    """Stdin to its end. A pipe that somebody holds open is waited for, which is said after a second."""
    try:
        fd = sys.stdin.fileno()
    except (OSError, ValueError):  # a stand-in for stdin, which does not wait
        return sys.stdin.buffer.read()
    parts: list[bytes] = []
    size = 0
    speak_at: float | None = time.monotonic() + PATIENCE
    while True:
        if speak_at is not None and time.monotonic() >= speak_at:
            speak_at = None
            click.echo(
                "Waiting for the end of what is piped in on stdin (Ctrl+C stops; </dev/null: nothing is).",
                err=True,
            )
        try:
            wait = None if speak_at is None else max(0.0, speak_at - time.monotonic())
            if not select.select([fd], [], [], wait)[0]:
                continue
            part = os.read(fd, 1 << 20)
        except BlockingIOError:  # somebody else was faster
            continue
        except (OSError, ValueError) as e:
            said = e.strerror if isinstance(e, OSError) else e
            raise UsageError(f"Stdin cannot be read: {said}.", "Pipe text, or add </dev/null.") from e
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_TEXT:
            raise UsageError(
                f"More than {MAX_TEXT >> 20} MB are piped in, which no model can read at once.",
                "Pipe less text.",
            )
