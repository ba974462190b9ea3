"""Which model, where none is named: config.toml's, the one used last, and on an empty machine a question."""

from __future__ import annotations

import sys

import click

from tinychat.base import remembered
from tinychat.base.errors import ModelNotFoundError, TinychatError
from tinychat.base.machine import human_bytes, human_rate
from tinychat.base.preferences import Preferences


def usual_model(preferences: Preferences) -> tuple[str, str]:
    """The model that is taken where none is named, and who says so; two empty strings where there is none.

    It is config.toml's, or the one used last (also one whose download has begun), or the one pulled last.
    """
    if preferences.model:
        return preferences.model, "config.toml"
    from tinychat.hub import reach

    last = remembered.recall().get("model")
    if isinstance(last, str) and last and reach.is_within_reach(last):
        return last, "used last"
    newest = reach.pulled_last()
    return (newest, "pulled last") if newest else ("", "")


def no_model() -> TinychatError:
    """The error of a command that needs a model where there is none, and nobody can be asked."""
    from tinychat.hub.fits import Machine, available, offer, read_bandwidth
    from tinychat.hub.installing import offline_by_environment

    if offline_by_environment():
        return ModelNotFoundError(
            "There is no model on this machine yet, and tinychat is offline.",
            "Name a model's file: tinychat run FILE.gguf, or unset HF_HUB_OFFLINE and TINYCHAT_OFFLINE.",
        )
    machine = Machine.here(read_bandwidth())
    get = "".join(
        f"Get one: tinychat pull {f.name} ({human_bytes(f.size)}). "
        for f in offer(available(machine), machine)[:1]
    )
    return ModelNotFoundError(
        "There is no model on this machine yet.", f"{get}All names: tinychat list --available"
    )


def model_unasked() -> str:
    """One answer on an empty machine: a model in Hugging Face's cache, or the demo; stderr says so.

    Raises ModelNotFoundError where nothing can be had.
    """
    from tinychat.hub.fits import DEMO, Machine, available
    from tinychat.hub.installing import offline_by_environment
    from tinychat.hub.reach import cached

    if here := cached():
        return here[0]
    fits = [] if offline_by_environment() else available(Machine.here())
    if not any(f.demo and not f.why_not for f in fits):
        raise no_model()
    click.echo(
        f"There is no model on this machine yet: {DEMO} answers, a demo that knows little.\n"
        "For a better one: tinychat run in a terminal, or tinychat list --available.",
        err=True,
    )
    return DEMO


def choose_model() -> str:
    """Ask on the terminal which model to begin with. Raises ModelNotFoundError where nobody can be asked, or
    nothing can be had.
    """
    from tinychat.hub.fits import Machine, available, offer, read_bandwidth
    from tinychat.hub.installing import offline_by_environment
    from tinychat.hub.reach import cached

    machine = Machine.here(read_bandwidth())
    lines = [
        (f.name, f"{human_bytes(f.size):>7}  {human_rate(f.rate)} tok/s  {f.license:<10}  {f.good_for}")
        for f in ([] if offline_by_environment() else offer(available(machine), machine))
    ]
    lines = [(name, "is here, in Hugging Face's cache") for name in cached()] + lines
    if not lines or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise no_model()
    click.echo("There is no model on this machine yet. These fit (download, estimated speed):", err=True)
    for i, (name, facts) in enumerate(lines, 1):
        click.echo(f"  {i}  {name:<15} {facts}", err=True)
    number = click.prompt("Which one", type=click.IntRange(1, len(lines)), default=1, err=True)
    return lines[number - 1][0]
