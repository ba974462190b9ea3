"""Entry point: the commands, and how every failure becomes two lines and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import click

from tinychat import __version__
from tinychat.base import errors, terminal
from tinychat.base.characters import make_printable
from tinychat.cli import chat, chats, doctor, models, preferred, reports, serve

INTERRUPTED = 130


class ReaderGoneError(Exception):
    """Whoever read our output has seen enough (`| head`)."""


class Commands(click.Group):
    """The group; keeps click from making an error of a closed pipe."""

    def make_context(self, *args, **kwargs) -> click.Context:  # prints --help and --version
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError as e:
            raise ReaderGoneError from e

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except BrokenPipeError as e:
            raise ReaderGoneError from e


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tinychat")
def cli() -> None:
    """Chat with a language model on your own machine."""


groups = (chat, serve, chats, models, reports, doctor, preferred)
for command in (c for group in groups for c in group.commands):
    cli.add_command(command)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 error, 2 usage, 3 not found, 4 does not fit in memory, 130
    interrupted.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (`<&-`)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    make_printable(sys.stdin)
    terminal.guard()
    warnings.showwarning = _warn
    try:
        code = cli.main(args=argv, prog_name="tinychat", standalone_mode=False, color=terminal.color()) or 0
        sys.stdout.flush()
    except BaseException as e:
        if isinstance(e, SystemExit) and not _reader_gone(e):
            raise
        code = report(e)
    sys.exit(code)


def report(e: BaseException) -> int:
    """Say what went wrong in two lines on stderr; the exit code."""
    if _reader_gone(e):
        # Keep the interpreter from complaining at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(e, (KeyboardInterrupt, click.exceptions.Abort)) or _from_interrupt(e):
        click.echo(err=True)
        return INTERRUPTED
    if os.environ.get("TINYCHAT_DEBUG"):
        traceback.print_exception(e)
    if isinstance(e, click.exceptions.Exit):
        return e.exit_code
    if isinstance(e, click.ClickException):
        if isinstance(e, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since click 8.2
            e.show()
            return e.exit_code
        where = getattr(e, "ctx", None)
        what, code = " ".join(e.format_message().split()).rstrip(".") + ".", e.exit_code
        todo = f"See {where.command_path if where else 'tinychat'} --help."
    else:
        error = errors.of(e)
        what, todo, code = error.what, error.todo, error.exit_code
    terminal.label("Error:", "red", err=True)
    click.echo(f" {what}\n{todo}", err=True)
    return code


def _reader_gone(e: BaseException) -> bool:
    """Whether our reader is gone, also where rich (tables) has made an exit with code 1 of it."""
    cause = e.__context__ if isinstance(e, SystemExit) else e
    return isinstance(cause, (ReaderGoneError, BrokenPipeError))


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of ours is a plain sentence to the user; a library's is as Python shows it."""
    if Path(__file__).parents[1] in Path(filename).parents:
        click.echo(str(message), err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), nl=False, err=True)


def _from_interrupt(e: BaseException) -> bool:
    """Whether Ctrl+C is the cause: Python 3.11 and earlier wrap what comes while a class is being made."""
    return isinstance(e, RuntimeError) and isinstance(e.__cause__, KeyboardInterrupt)


if __name__ == "__main__":
    main()
