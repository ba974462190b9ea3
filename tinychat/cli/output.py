"""How an answer is written to a terminal or a pipe, line by line."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import terminal
from tinychat.base.characters import is_unicode

if TYPE_CHECKING:
    from tinychat.base.events import Event, Stats
    from tinychat.dialogue import Dialogue


class Printer:
    """Writes an answer to stdout as it comes. Its reasoning is for people: seen on a terminal, before the
    answer, and never in a pipe.
    """

    def __init__(self):
        self.last = "\n"
        self.thinking = False

    def show(self, event: Event) -> None:
        """Show what an event says."""
        reasoning = getattr(event, "reasoning", "")
        if reasoning and sys.stdout.isatty():
            if not self.thinking and terminal.color() is False:
                self.write("(thinking)\n")
            self.thinking, self.last = True, reasoning[-1]
            terminal.faint(reasoning)
            sys.stdout.flush()
        if event.text and self.thinking:
            self.end()
            self.write("\n" if terminal.color() is not False else "(answer)\n")
            self.thinking = False
        self.write(event.text)

    def write(self, text: str) -> None:
        """Show text at once."""
        if not text:
            return
        self.last = text[-1]
        sys.stdout.write(text)
        sys.stdout.flush()

    def line(self, text: str) -> None:
        """A whole line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def json(self, value: Any, **options: Any) -> None:
        """A line of JSON, every character as itself or, where it cannot be, as its number."""
        self.line(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout), **options))

    def end(self) -> None:
        """Finish the last line."""
        if self.last != "\n":
            self.write("\n")


@contextmanager
def cancel_on_interrupt(session: Dialogue) -> Iterator[list[bool]]:
    """Ctrl+C stops the answer and keeps what was said; a second one, while that takes long, interrupts for
    good.
    """
    interrupted: list[bool] = []

    def handler(_signal, _frame):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        session.cancel()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def describe(stats: Stats) -> str:
    """The timings of an answer in one line."""
    reused = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    drafted = ""
    if stats.drafted_tokens:
        drafted = (
            f", {stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted, "
            f"{stats.tokens_per_step:.2f} tokens a step, speed-up {stats.draft_speedup:.2f}"
        )
    reading = f", {stats.prefill_tps:.1f} tok/s" if stats.prefill_tps else ""  # a server does not tell
    return (
        f"prompt {stats.prompt_tokens} tokens{reused}{reading}, first token after "
        f"{stats.ttft_s:.2f} s · answer {stats.generated_tokens} tokens, {stats.decode_tps:.1f} tok/s"
        f"{drafted}"
    )


def show_events(events: Iterator[Event], out: Printer):
    """Print a stream of events; the Done at its end."""
    from tinychat.base.events import Done, Notice

    done = None
    try:
        for event in events:
            out.show(event)
            if isinstance(event, Notice):
                click.echo(event.message, err=True)
            if isinstance(event, Done):
                done = event
    finally:
        out.end()  # an error begins a line of its own, too
    return done
